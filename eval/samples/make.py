"""Write the samples beside this file: 20 items of our own for every task of the suites, in its data set's exact format.

They stand in for the real data sets in tests, and show which columns a local copy needs. Nothing in them is taken from
those data sets: people, places and facts are invented, numbers are computed. Run it again after a change:

    python eval/samples/make.py [FOLDER]
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ITEMS = 20
HERE = Path(__file__).resolve().parent
PEOPLE = ["Arvo", "Bela", "Caro", "Dena", "Emil", "Fara", "Gero", "Hana", "Ivo", "Jana"]
TOWNS = [
    "Aldermoor",
    "Brackwell",
    "Corvesse",
    "Dunmarrow",
    "Eastervale",
    "Fennick",
    "Garroway",
    "Hollin",
    "Ingleby",
    "Jarrow",
]
RIVERS = ["Ashe", "Brill", "Cray", "Dove", "Elver", "Fern", "Gale", "Holt", "Isk", "Jule"]
THINGS = ["apple", "brick", "candle", "drum", "envelope", "flute", "glove", "hammer", "inkpot", "jar"]

Rows = list[dict[str, Any]]


def world_knowledge() -> dict[str, Rows]:
    trivia, natural, web = [], [], []
    for i in range(ITEMS):
        town, river, person = TOWNS[i % 10], RIVERS[(3 * i) % 10], PEOPLE[(7 * i + i // 10) % 10]
        question = [f"On which river does the invented town of {town} lie", f"Who built the tower of {town}"][i // 10]
        answer = [river, person][i // 10]
        trivia.append(
            {
                "question": f"{question}?",
                "question_id": f"sample_{i}",
                "question_source": "invented",
                "entity_pages": {"doc_source": [], "filename": [], "title": [], "wiki_context": []},
                "search_results": {
                    "description": [],
                    "filename": [],
                    "rank": [],
                    "title": [],
                    "url": [],
                    "search_context": [],
                },
                "answer": {
                    "aliases": [answer, f"The {answer}"],
                    "normalized_aliases": [answer.lower()],
                    "matched_wiki_entity_name": "",
                    "normalized_matched_wiki_entity_name": "",
                    "normalized_value": answer.lower(),
                    "type": "FreeForm",
                    "value": answer,
                },
            }
        )
        natural.append({"question": question[0].lower() + question[1:], "answer": [answer, f"the {answer}"]})
        web.append({"url": f"http://example.org/{i}", "question": f"{question.lower()}?", "answers": [answer]})
    return {"triviaqa/validation": trivia, "nq_open/validation": natural, "webqs/test": web}


def grade_school(count: int, seed: int) -> Rows:
    draw, rows = random.Random(seed), []
    for _ in range(count):
        person, thing = draw.choice(PEOPLE), draw.choice(THINGS)
        boxes, each, lost = draw.randint(3, 9), draw.randint(4, 12), draw.randint(1, 9)
        total = boxes * each
        rows.append(
            {
                "question": f"{person} has {boxes} boxes with {each} {thing}s in each. {person} loses {lost} {thing}s. "
                f"How many {thing}s does {person} have now?",
                "answer": f"There are {boxes} * {each} = <<{boxes}*{each}={total}>>{total} {thing}s.\n"
                f"After the loss {total} - {lost} = <<{total}-{lost}={total - lost}>>{total - lost} are left.\n"
                f"#### {total - lost}",
            }
        )
    return rows


def competition_math() -> dict[str, Rows]:
    def algebra(a: int, b: int) -> tuple[str, str]:
        return f"Solve ${a}x + {b} = {a * (b + 1) + b}$ for $x$.", f"{b + 1}"

    def counting(a: int, b: int) -> tuple[str, str]:
        return f"In how many ways can one flag of {a} and one ribbon of {b} be chosen?", f"{a * b}"

    def geometry(a: int, b: int) -> tuple[str, str]:
        return f"What is the area of a triangle with base ${2 * a}$ and height ${b}$?", f"{a * b}"

    def intermediate(a: int, b: int) -> tuple[str, str]:
        return f"What is the sum of the roots of $x^2 - {a + b}x + {a * b}$?", f"{a + b}"

    def numbers(a: int, b: int) -> tuple[str, str]:
        return f"What is the remainder of ${a * 7 + b}$ divided by $7$?", f"{(a * 7 + b) % 7}"

    def prealgebra(a: int, b: int) -> tuple[str, str]:
        return f"Write ${a}$ divided by ${2 * a + 1}$ as a fraction.", f"\\frac{{{a}}}{{{2 * a + 1}}}"

    def precalculus(a: int, b: int) -> tuple[str, str]:
        return f"What is the length of the vector $({3 * a}, {4 * a})$?", f"{5 * a}"

    subjects: dict[str, tuple[str, Callable[[int, int], tuple[str, str]]]] = {
        "algebra": ("Algebra", algebra),
        "counting_and_probability": ("Counting & Probability", counting),
        "geometry": ("Geometry", geometry),
        "intermediate_algebra": ("Intermediate Algebra", intermediate),
        "number_theory": ("Number Theory", numbers),
        "prealgebra": ("Prealgebra", prealgebra),
        "precalculus": ("Precalculus", precalculus),
    }
    files = {}
    for number, (file, (kind, make)) in enumerate(subjects.items()):
        draw, rows = random.Random(number), []
        for i in range(ITEMS):
            problem, answer = make(draw.randint(2, 9), draw.randint(2, 9))
            solution = f"By the usual rule the answer is $\\boxed{{{answer}}}$."
            rows.append({"problem": problem, "level": f"Level {1 + i % 5}", "type": kind, "solution": solution})
        files[f"math/{file}"] = rows
    return files


# Name | parameter | what it returns | how | argument | result
FUNCTIONS = """
double_all | numbers | a list with every number doubled. | [2 * n for n in numbers] | [1, 2] | [2, 4]
count_vowels | text | how many vowels a text has. | sum(c in 'aeiou' for c in text) | 'banana' | 3
last_word | text | the last word of a text. | text.split()[-1] | 'a bc def' | 'def'
is_sorted | items | whether the items are in rising order. | items == sorted(items) | [1, 3, 2] | False
join_pairs | pairs | a dictionary made from pairs. | dict(pairs) | [(1, 2)] | {1: 2}
sum_digits | n | the sum of the digits of n. | sum(int(d) for d in str(n)) | 507 | 12
second_largest | items | the second largest item. | sorted(items)[-2] | [4, 9, 7] | 7
without_spaces | text | a text without its spaces. | text.replace(' ', '') | 'a b c' | 'abc'
factorial_of | n | the factorial of n. | 1 if n < 2 else n * factorial_of(n - 1) | 5 | 120
evens | numbers | the even numbers. | [n for n in numbers if n % 2 == 0] | [1, 2, 4] | [2, 4]
longest | words | the longest word. | max(words, key=len) | ['a', 'bcd'] | 'bcd'
is_mirror | text | whether a text reads the same backwards. | text == text[::-1] | 'level' | True
flatten | rows | one list from a list of lists. | [x for row in rows for x in row] | [[1], [2]] | [1, 2]
remainders | numbers | the remainders by three. | [n % 3 for n in numbers] | [4, 5] | [1, 2]
initials | name | the initials of a name. | ''.join(w[0] for w in name.split()) | 'Ann Bo' | 'AB'
cubes_below | n | the cubes of the numbers below n. | [i ** 3 for i in range(n)] | 3 | [0, 1, 8]
common | pair | the sorted common items of two lists. | sorted(set(pair[0]) & set(pair[1])) | ([1, 2], [2]) | [2]
mean_of | numbers | the mean of the numbers. | sum(numbers) / len(numbers) | [1, 2, 6] | 3.0
swap_ends | items | a list with first and last exchanged. | [items[-1], *items[1:-1], items[0]] | [1, 2, 3] | [3, 2, 1]
count_all | text | how often letters occur. | {c: text.count(c) for c in text} | 'aba' | {'a': 2, 'b': 1}
"""


def code() -> dict[str, Rows]:
    functions = [line.split(" | ") for line in FUNCTIONS.strip().splitlines()]
    human = [
        {
            "task_id": f"Sample/{i}",
            "prompt": f'def {name}({given}):\n    """Return {text}\n    >>> {name}({call})\n    {result}\n    """\n',
            "canonical_solution": f"    return {body}\n",
            "test": f"METADATA = {{}}\n\n\ndef check(candidate):\n    assert candidate({call}) == {result}\n",
            "entry_point": name,
        }
        for i, (name, given, text, body, call, result) in enumerate(functions)
    ]
    basic = [
        {
            "task_id": 11 + i,
            "text": f"Write a function to return {text}",
            "code": f"def {name}({given}):\n    return {body}",
            "test_list": [
                f"assert {name}({call}) == {result}",
                f"assert {name}({call}) is not None",
                f"assert callable({name})",
            ],
            "test_setup_code": "",
            "challenge_test_list": [],
        }
        for i, (name, given, text, body, call, result) in enumerate(functions)
    ]
    examples = [row | {"task_id": i + 1, "text": f"{row['text']} Keep it short."} for i, row in enumerate(basic[:10])]
    return {"humaneval/test": human, "mbpp/test": basic, "mbpp/prompt": examples}


def instructions() -> Rows:
    makers: list[Callable[[int], tuple[str, str, dict[str, Any]]]] = [
        lambda i: ("Do not use any commas.", "punctuation:no_comma", {}),
        lambda i: ("Write in lower case only.", "change_case:english_lowercase", {}),
        lambda i: (f"Use the word {THINGS[i % 10]}.", "keywords:existence", {"keywords": [THINGS[i % 10]]}),
        lambda i: (f"Never say {THINGS[i % 10]}.", "keywords:forbidden_words", {"forbidden_words": [THINGS[i % 10]]}),
        lambda i: ("Put the whole answer in double quotation marks.", "startend:quotation", {}),
        lambda i: (
            f"Write at least {10 + i} words.",
            "length_constraints:number_words",
            {"relation": "at least", "num_words": 10 + i},
        ),
    ]
    rows = []
    for i in range(ITEMS):
        chosen = [makers[i % 6](i), makers[(i + 1 + i // 6) % 6](i)][: 1 + i % 2]
        subject = f"Describe the market of {TOWNS[i % 10]}."
        rows.append(
            {
                "key": i,
                "prompt": " ".join([subject, *(text for text, _, _ in chosen)]),
                "instruction_id_list": [name for _, name, _ in chosen],
                "kwargs": [given for _, _, given in chosen],
            }
        )
    return rows


def commonsense() -> dict[str, Rows]:
    draw = random.Random(8)
    files: dict[str, Rows] = {name: [] for name in ("boolq", "piqa", "social_iqa", "hellaswag", "winogrande")}
    science: dict[str, Rows] = {name: [] for name in ("arc_easy", "arc_challenge", "openbookqa")}
    for i in range(ITEMS):
        person, other = PEOPLE[i % 10], PEOPLE[(i + 3) % 10]
        thing, town, right = THINGS[i % 10], TOWNS[(i + i // 10) % 10], draw.randrange(2)
        files["boolq"].append(
            {
                "question": f"does the river reach {town}",
                "passage": f"The river runs past {town if right else TOWNS[(i + 5) % 10]} and ends in a lake.",
                "idx": i,
                "label": right,
            }
        )
        ways = [f"put the {thing} in a bag and close it", f"put the bag in the {thing} and open it"]
        files["piqa"].append(
            {"goal": f"carry a {thing} home", "sol1": ways[right], "sol2": ways[1 - right], "label": right}
        )
        answers = [f"thank {other}", f"scold {other}", f"forget {other}"]
        shift = draw.randrange(3)
        answers = answers[shift:] + answers[:shift]
        files["social_iqa"].append(
            {
                "context": f"{other} helped {person} to find the {thing}.",
                "question": f"What will {person} do next?",
                **{f"answer{letter}": text for letter, text in zip("ABC", answers, strict=True)},
                "label": str(1 + (-shift) % 3),
            }
        )
        endings = ["puts it on the shelf.", "eats the wall.", "becomes a river.", "paints the rain."]
        turn = draw.randrange(4)
        begin = f"{person} takes the {thing} from the table."
        files["hellaswag"].append(
            {
                "ind": i,
                "activity_label": "Tidying up",
                "ctx_a": begin,
                "ctx_b": "then the person",
                "ctx": f"{begin} then the person",
                "endings": endings[turn:] + endings[:turn],
                "source_id": f"sample~{i}",
                "split": "val",
                "split_type": "indomain",
                "label": str((-turn) % 4),
            }
        )
        names = [person, other] if right else [other, person]
        files["winogrande"].append(
            {
                "sentence": f"{person} lent {other} the {thing} because _ had two of them.",
                "option1": names[0],
                "option2": names[1],
                "answer": "1" if right else "2",
            }
        )
        weight, heavier = draw.sample(range(2, 40), 2)
        options = [f"{max(weight, heavier)} kilograms", f"{min(weight, heavier)} kilograms", "nothing", "a day"]
        order = draw.sample(range(4), 4)
        choices = {"text": [options[j] for j in order], "label": ["A", "B", "C", "D"]}
        for name, rows in science.items():
            stem = f"Two {thing}s weigh {weight} and {heavier} kilograms. What does the heavier one weigh?"
            rows.append(
                {
                    "id": f"sample_{name}_{i}",
                    "question_stem" if name == "openbookqa" else "question": stem,
                    "choices": choices,
                    "answerKey": "ABCD"[order.index(0)],
                }
            )
    splits = {name: "validation" for name in files} | {name: "test" for name in science}
    return {f"{name}/{splits[name]}": rows for name, rows in (files | science).items()}


def commonsense_instructions(items: dict[str, Rows]) -> dict[str, Rows]:
    """The same items in the form of LLM-Adapters: an instruction that lists the choices; the right one's name."""

    def row(question: str, name: str, choices: list[str], answer: int) -> dict[str, Any]:
        listed = " ".join(f"{name.capitalize()}{n}: {text}" for n, text in enumerate(choices, 1))
        form = "/".join(f"{name}{n}" for n in range(1, len(choices) + 1))
        return finished(f"{question}\n\n{listed}\n\nAnswer format: {form}", f"{name}{answer + 1}")

    def finished(instruction: str, answer: str) -> dict[str, Any]:
        return {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}

    def science(item: dict[str, Any]) -> dict[str, Any]:
        question = item.get("question") or item["question_stem"]
        return row(
            f"Choose the right answer: {question}", "answer", item["choices"]["text"], "ABCD".index(item["answerKey"])
        )

    files = {
        "boolq": [
            finished(
                f"Say true or false. {one['passage']} Question: {one['question']}?\n\nAnswer format: true/false",
                ["false", "true"][one["label"]],
            )
            for one in items["boolq/validation"]
        ],
        "piqa": [
            row(
                f"Choose the way to reach the goal: {one['goal']}", "solution", [one["sol1"], one["sol2"]], one["label"]
            )
            for one in items["piqa/validation"]
        ],
        "social_i_qa": [
            row(
                f"{one['context']} {one['question']}",
                "answer",
                [one[f"answer{letter}"] for letter in "ABC"],
                int(one["label"]) - 1,
            )
            for one in items["social_iqa/validation"]
        ],
        "hellaswag": [
            row(f"Choose what comes next: {one['ctx']}", "ending", one["endings"], int(one["label"]))
            for one in items["hellaswag/validation"]
        ],
        "winogrande": [
            row(f"Fill the gap: {one['sentence']}", "option", [one["option1"], one["option2"]], int(one["answer"]) - 1)
            for one in items["winogrande/validation"]
        ],
        "ARC-Easy": [science(one) for one in items["arc_easy/test"]],
        "ARC-Challenge": [science(one) for one in items["arc_challenge/test"]],
        "openbookqa": [science(one) for one in items["openbookqa/test"]],
    }
    return {f"commonsense_generate/{name}/test": rows for name, rows in files.items()}


def paragraph(draw: random.Random) -> str:
    town, river, person, thing = (draw.choice(words) for words in (TOWNS, RIVERS, PEOPLE, THINGS))
    return (
        f"{person} came to {town} in the spring, when the {river} was high. In the square stood a stall with one "
        f"{thing} on it, and nobody to sell it."
    )


def texts() -> dict[str, list[str]]:
    """Plain text: PTB's one sentence to a line, books and other texts as files of their own."""
    draw = random.Random(20)
    ptb = [
        f" {draw.choice(PEOPLE).lower()} paid N for the <unk> {draw.choice(THINGS)} of {town.lower()} "
        for town in TOWNS * 2
    ]
    books = {f"pg19/test/{i}.txt": [paragraph(draw) for _ in range(3)] for i in range(ITEMS)}
    return {"ptb/test.txt": ptb, "text_file/sample.txt": [paragraph(draw) for _ in range(ITEMS)], **books}


def pages() -> Rows:
    draw = random.Random(21)
    return [{"page": f" = {town} = \n\n {paragraph(draw)} \n"} for town in TOWNS * 2]


def encoder_tasks() -> dict[str, Rows]:
    draw, files = random.Random(22), {}
    pairs = {
        "mrpc": ("sentence1", "sentence2", 2),
        "qqp": ("question1", "question2", 2),
        "stsb": ("sentence1", "sentence2", 0),
        "mnli": ("premise", "hypothesis", 3),
        "qnli": ("question", "sentence", 2),
        "rte": ("sentence1", "sentence2", 2),
    }

    def label(classes: int) -> float | int:
        return draw.randrange(classes) if classes else draw.randrange(0, 51) / 10

    for split in ("train", "validation"):
        for task in ("cola", "sst2"):
            files[f"glue/{task}/{split}"] = [
                {"sentence": paragraph(draw), "label": label(2), "idx": i} for i in range(ITEMS)
            ]
        for task, (first, second, classes) in pairs.items():
            name = "validation_matched" if (task, split) == ("mnli", "validation") else split
            files[f"glue/{task}/{name}"] = [
                {first: paragraph(draw), second: paragraph(draw), "label": label(classes), "idx": i}
                for i in range(ITEMS)
            ]
        for version in (1, 2):
            rows = []
            for i in range(ITEMS):
                town, person = draw.choice(TOWNS), draw.choice(PEOPLE)
                context = f"The bridge of {town} was built by {person} in one summer."
                none = version == 2 and i % 4 == 3
                answers = {"text": [], "answer_start": []}
                if not none:
                    answers = {
                        "text": [person],
                        "answer_start": [context.index(person, len("The bridge of ") + len(town))],
                    }
                asked = "painted" if none else "built"
                rows.append(
                    {
                        "id": f"sample_v{version}_{split}_{i}",
                        "title": town,
                        "context": context,
                        "question": f"Who {asked} the bridge of {town}?",
                        "answers": answers,
                    }
                )
            files[f"squad_v{version}/{split}"] = rows
    return files


def dialogues() -> Rows:
    kinds = ["writing", "roleplay", "reasoning", "math"]
    rows = []
    for i in range(ITEMS):
        kind, town, thing = kinds[i % 4], TOWNS[i % 10], THINGS[(i + i // 10) % 10]
        row: dict[str, Any] = {"question_id": 1001 + i, "category": kind}
        if kind == "math":
            row["turns"] = [f"What is {i} times 7?", "And how much is that plus 5?"]
            row["reference"] = [f"{i * 7}", f"{i * 7 + 5}"]
        else:
            row["turns"] = [f"Write two sentences about a {thing} in {town}.", "Now say the same to a child."]
        rows.append(row)
    return rows


def files() -> dict[str, str]:
    """Every sample's content by its path."""
    items = commonsense()
    tables = {
        **world_knowledge(),
        "gsm8k/train": grade_school(ITEMS, 1),
        "gsm8k/test": grade_school(ITEMS, 2),
        **competition_math(),
        **code(),
        "ifeval/train": instructions(),
        **items,
        "wikitext/test": pages(),
        **encoder_tasks(),
        "mt_bench/question": dialogues(),
    }
    content = {f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows) for name, rows in tables.items()}
    for name, rows in commonsense_instructions(items).items():
        content[f"{name}.json"] = json.dumps(rows, indent=1) + "\n"
    return content | {name: "\n".join(lines) + "\n" for name, lines in texts().items()}


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    for name, content in files().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
