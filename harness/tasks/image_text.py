"""Questions about images, answered in text: LLaVA (Liu et al., 2023, 2024) and what shares its processor's interface.

A row is a conversation of one turn in the processor's own chat template, with the image tokens that its processor puts
in an image's place. The loss is on the answer and on what ends it. Rows without an image may stand among others.
docs/llava.md says what was decided where papers are silent.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image

from harness.config import SourceConfig, nearest
from harness.console import progress, say
from harness.data.collation import collate
from harness.data.images import Picture, pictures, without_bad_images
from harness.data.sources import read_rows
from harness.data.templates import fill
from harness.data.tokenisation import IGNORED, Row
from harness.errors import UserError
from harness.evaluation import visual_metrics
from harness.tasks.base import Shown, Task

if TYPE_CHECKING:
    from torch import nn

ANSWER_TOKENS = 64  # of a generated answer, at most
CHAT = "none"  # `template`: none of ours, so the processor's
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ASKED = ("data.validation", "eval:")  # sources whose answers are compared with, and not read by a model
_DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
_POPE = "pope_"


@dataclass(frozen=True)
class Question:
    """A question, the images that it is about, and right answers.

    Attributes:
        prompt: the question, under its template. It may say where images stand, by the processor's image token.
        chat: whether the processor's chat template goes around it.
        images: none of a text-only row.
        answers: all that are right; none where the source does not say. The first is the one to be learned.
        options: to choose from, as they stand in the prompt.
        where: its row, for messages.
    """

    prompt: str
    chat: bool
    images: tuple[Picture, ...] = ()
    answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    where: str = "row 0"


@dataclass(frozen=True)
class _Rows:
    """A source that was read, its images not opened. ``question`` makes one of a row's number, or says what is wrong
    with the row."""

    images: list[tuple[Picture, ...]]
    question: Callable[[int], Question]


@dataclass(frozen=True)
class ImageRow(Row):
    """A row whose ``images`` are opened when a batch is made; ``process`` makes of them what the model reads."""

    images: tuple[Picture, ...] = ()
    process: Any = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """``pixel_values``, (images, channels, height, width); nothing without an image."""
        return self.process([picture.open() for picture in self.images]) if self.images else {}

    def digests(self) -> list[str]:
        """Of the images' files."""
        return self._digests

    @cached_property
    def _digests(self) -> list[str]:
        return [picture.digest() for picture in self.images]


class ImageText(Task):
    """Questions about images."""

    name = "image_text"
    summary = "a text that answers a question about images (LLaVA)"
    generates = True
    metrics: ClassVar[tuple[str, ...]] = ("exact_match",)

    # -- what reads ----------------------------------------------------------------------------------------------------

    @cached_property
    def reader(self) -> Any:
        """The processor.

        Raises:
            UserError: there is none for images and text, or it says neither how many tokens an image is nor could
                the model's configuration.
        """
        from transformers import AutoConfig, AutoProcessor

        path = self.config.model.path
        try:
            processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"model.path: no processor in {path!r}: {' '.join(str(error).split())}") from error
        if not hasattr(processor, "image_processor") or not hasattr(processor, "image_token"):
            raise UserError(
                f"model.path: {path} has no processor of images and text; task 'image_text' is for models such as "
                "LLaVA, for others set another task"
            )
        tokenizer = processor.tokenizer
        if tokenizer.eos_token is None:
            raise UserError(f"model.path: the tokenizer of {path!r} has no end-of-sequence token; set one and save it")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if hasattr(processor, "patch_size") and processor.patch_size is None:  # folders of older versions
            described = AutoConfig.from_pretrained(path, trust_remote_code=False)
            processor.patch_size = described.vision_config.patch_size
            processor.vision_feature_select_strategy = described.vision_feature_select_strategy
            processor.num_additional_image_tokens = 1  # the class token of CLIP
        if processor.chat_template is None:
            _say_there_is_no_template(path, processor.image_token)
        return processor

    @cached_property
    def image_id(self) -> int:
        """The token that stands for a part of an image."""
        return self.tokenizer.convert_tokens_to_ids(self.reader.image_token)

    @cached_property
    def turn_end(self) -> int:
        """The token that ends an answer."""
        return self._tokens(Question("?", True, answers=("!",)))[0][-1]

    @cached_property
    def context(self) -> int:
        """How many tokens the model reads at most."""
        from transformers import AutoConfig

        described = AutoConfig.from_pretrained(self.config.model.path, trust_remote_code=False)
        return described.get_text_config().max_position_embeddings

    def process(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """What the model reads of ``images``, one after the other along the first dimension, in the model's dtype.

        Raises:
            UserError: the processor cuts images up, so that rows of different images do not stack.
        """
        found = {
            name: value.to(getattr(torch, self.config.model.dtype)) if value.is_floating_point() else value
            for name, value in self.reader.image_processor(images, return_tensors="pt").items()
            if isinstance(value, torch.Tensor)
        }
        pixels = found.get("pixel_values")
        if pixels is None or pixels.ndim != 4 or len(pixels) != len(images):
            raise UserError(
                f"model.path: the image processor of {self.config.model.path} cuts images into parts; task "
                "'image_text' is for models that read an image as one, such as LLaVA-1.5"
            )
        return found

    def image_tokens(self, size: tuple[int, int]) -> list[int]:
        """The tokens that the processor puts in the place of an image of ``size`` (width, height)."""
        if size not in self._image_tokens:
            text, blank = self.reader.image_token, Image.new("RGB", size)
            (ids,) = self.reader(text=[text], images=[blank], add_special_tokens=False)["input_ids"]
            self._image_tokens[size] = list(ids)
        return self._image_tokens[size]

    @cached_property
    def _image_tokens(self) -> dict[tuple[int, int], list[int]]:
        return {}

    # -- data ----------------------------------------------------------------------------------------------------------

    def check(self, key: str, source: SourceConfig) -> None:
        """Raise `UserError` for a missing column, for what is for text alone, and for a row of a local file that
        cannot be.

        No image is opened, but those of such a row where ``data.bad_images`` is ``skip``: it may be left out for them.
        """
        self._check_columns(key, source)
        path = Path(source.path)
        if not path.is_file() or path.suffix not in _DATA_SUFFIXES:  # what else there is may be far away
            return
        rows = self._unopened(source, key)
        reader = self.reader if Path(self.config.model.path).is_dir() else None
        learned = not key.startswith(_ASKED)
        seen: set[tuple[int, ...]] = set()
        for number, images in enumerate(rows.images):
            try:
                question = rows.question(number)
                if reader is not None:
                    self._check_places(question if learned else replace(question, answers=()), seen)
            except UserError:
                if self.config.data.bad_images == "skip" and any(picture.problem() for picture in images):
                    continue
                raise

    def _check_places(self, question: Question, seen: set[tuple[int, ...]]) -> None:
        """Raise `UserError` where images and their places in the text do not agree.

        Writing a conversation takes a while. How many places it has for images goes by the numbers in ``seen`` alone,
        so one is written for each.
        """
        token = self.reader.image_token
        numbers = [len(question.images), question.prompt.count(token), *(a.count(token) for a in question.answers[:1])]
        if tuple(numbers) not in seen:
            self._placed(question)
            seen.add(tuple(numbers))

    def _check_columns(self, key: str, source: SourceConfig) -> None:
        super().check(key, source)
        config = self.config
        if config.anchor is not None and config.anchor.tokens == "answer":
            raise UserError(
                "anchor.tokens: answer given; answers of the original model are for task 'causal_lm'; use all or last"
            )
        if config.data.replay is not None and config.data.replay.answers:
            raise UserError(
                "data.replay.answers: true given; answers of the original model are for task 'causal_lm'; leave it out"
            )
        if source.options is not None and not 1 <= len(source.options) <= len(LETTERS):
            raise UserError(f"{key}.options: {len(source.options)} columns given; from 1 to {len(LETTERS)}")
        if source.image is None and source.image_folder is not None:
            raise UserError(f"{key}.image: missing; {key}.image_folder is where paths in that column start")
        if source.image_folder is not None and Path(source.path).exists() and not Path(source.image_folder).is_dir():
            raise UserError(f"{key}.image_folder: {source.image_folder}: no such folder; paths of images start there")

    def read(self, source: SourceConfig, key: str) -> list[Question]:
        """All questions of ``source``, without those whose images are bad where these are to be skipped.

        Raises:
            UserError: it cannot be read, a column or value is not there, an image is missing or damaged and not to be
                skipped.
        """
        self._check_columns(key, source)
        rows = self._unopened(source, key)
        images = rows.images
        kept = without_bad_images(images, self.config.data.bad_images, key) if any(images) else range(len(images))
        return [rows.question(number) for number in kept]

    def _unopened(self, source: SourceConfig, key: str) -> _Rows:
        """The rows of ``source``; nothing is said of values yet."""
        rows = read_rows(source, key)
        for column in source.options or ():
            if column not in rows.column_names:
                raise UserError(
                    f"{key}.options: no column {column!r} in {source.path}; there are: {', '.join(rows.column_names)}"
                    f"{nearest(column, rows.column_names)}"
                )
        named = Path(source.path).name if Path(source.path).exists() else source.path
        images: list[tuple[Picture, ...]] = [()] * len(rows)
        if source.image is not None:
            images = pictures(rows, source.image, _folder(source), f"{key}.image: row {{}} of {named}")
        columns = {c: rows[c][:] for c in {source.prompt, source.pair, source.response, *(source.options or ())} if c}

        def question(number: int) -> Question:
            row = {column: values[number] for column, values in columns.items()}
            return self._question(source, key, row, images[number], f"row {number} of {named}")

        return _Rows(images, question)

    def _question(
        self, source: SourceConfig, key: str, row: Mapping[str, Any], images: tuple[Picture, ...], where: str
    ) -> Question:
        def value(field: str, column: str) -> Any:
            if row[column] is None:
                raise UserError(f"{key}.{field}: {where} has no value in {column!r}")
            return row[column]

        assert source.prompt is not None
        parts = [str(value("prompt", source.prompt))]
        if source.pair is not None and row[source.pair]:
            parts.insert(0, str(row[source.pair]))
        options: tuple[str, ...] = ()
        if source.options:
            options = _options([row[column] for column in source.options])
            if not options:
                raise UserError(f"{key}.options: {where} has no value in {', '.join(source.options)}")
            parts += [f"{LETTERS[place]}. {option}" for place, option in enumerate(options)]
        if source.instruction is not None:
            parts.append(source.instruction)
        answers = () if source.response is None else _answers(value("response", source.response), options)
        if source.response is not None and not answers:
            raise UserError(
                f"{key}.response: {where} has {row[source.response]!r} in {source.response!r}, which is no answer"
                + (f" among {len(options)} options" if options else "")
            )
        prompt = fill(source.template, "\n".join(parts))
        return Question(prompt, source.template == CHAT, images, answers, options, where)

    # -- rows ----------------------------------------------------------------------------------------------------------

    def rows(self, examples: Sequence[Question], description: str = "tokenise") -> list[Row]:
        """One row for each question; cut at ``data.max_length`` tokens, but never within an image.

        Raises:
            UserError: images and their places in the text do not agree, or the end of an image lies beyond
                ``data.max_length``.
        """
        return [self._row(example, self.config.data.max_length) for example in progress(examples, description)]

    def probe_row(self, row: Row) -> Row:
        """A short row, but with all of its images."""
        if not isinstance(row, ImageRow) or not row.images:
            return super().probe_row(row)
        end = _last(row.input_ids, self.image_id) + 1
        return replace(row, input_ids=row.input_ids[: max(end, self.shortest)], labels=[])

    def filler(self) -> Row:
        """A short row with an image and no loss, for passes that would have no image (`harness.models.filling`)."""
        blank = Picture("filler", lambda: _png(64))
        return replace(self._row(Question("", True, (blank,)), None), labels=[])

    def _row(self, question: Question, longest: int | None) -> ImageRow:
        ids, labels = self._expanded(*self._tokens(question), question.images)
        if longest is not None and question.images and (last := _last(ids, self.image_id)) >= longest:
            what = "image" if len(question.images) == 1 else "images"
            raise UserError(
                f"data.max_length: {longest} given; {question.where} has {last + 1} tokens up to the end of its "
                f"{what}, {ids.count(self.image_id)} of them the {what}; raise it, or shorten the question"
            )
        return ImageRow(ids[:longest], labels[:longest], images=question.images, process=self.process)

    def _tokens(self, question: Question) -> tuple[list[int], list[int]]:
        """Tokens, of an image one, and labels."""
        before, answer = self._placed(question)
        text = before + (answer or "")
        # A template may write the first special token itself.
        written = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=not written)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        end = self.tokenizer.eos_token_id
        closed = bool(ids) and ids[-1] == end
        if answer is None:
            if closed:  # a tokenizer that closes every text by itself
                ids, offsets = ids[:-1], offsets[:-1]
            labels = list(ids)
        else:
            boundary = len(before)
            # As in `harness.data.tokenisation`; what a special token of the template ends the answer with counts.
            labels = [
                token if start >= boundary < stop else IGNORED
                for token, (start, stop) in zip(ids, offsets, strict=True)
            ]
            if not closed and not self._ends_turn(text):
                ids, labels = [*ids, end], [*labels, end]
            elif closed:
                labels[-1] = end
        return ids, labels

    def _expanded(
        self, ids: Sequence[int], labels: Sequence[int], images: Sequence[Picture]
    ) -> tuple[list[int], list[int]]:
        """Tokens and labels with each image's tokens in its place, which carry no loss."""
        coming, all_ids, all_labels = iter(images), [], []
        for token, label in zip(ids, labels, strict=True):
            if token == self.image_id:
                own = self.image_tokens(next(coming).size())
                all_ids += own
                all_labels += [IGNORED] * len(own)
            else:
                all_ids.append(token)
                all_labels.append(label)
        return all_ids, all_labels

    def _placed(self, question: Question) -> tuple[str, str | None]:
        """`texts`, if they have a place for each image and no more."""
        before, answer = self.texts(question)
        slots = (before + (answer or "")).count(self.reader.image_token)
        if slots != len(question.images):
            raise self._misplaced(question, slots)
        return before, answer

    def texts(self, question: Question) -> tuple[str, str | None]:
        """What stands before the answer, an image token for each image; and the answer with what follows it in a turn.

        None where there is no answer to be learned.
        """
        answer = question.answers[0] if question.answers else None
        if not question.chat:
            return question.prompt, answer
        token = self.reader.image_token
        placed = question.prompt.split(token)
        if len(placed) == 1:  # the images come first, as in LLaVA-1.5
            placed = [""] * len(question.images) + placed
        text = [part.strip() for part in placed]
        if self.reader.chat_template is None:
            asked = "".join(f"{part}{token}\n" for part in text[:-1]) + text[-1]
            return f"USER: {asked} ASSISTANT:", None if answer is None else f" {answer.strip()}"
        content: list[dict[str, str]] = []
        for number, part in enumerate(text):
            content += [{"type": "image"}] if number else []
            content += [{"type": "text", "text": part}] if part else []
        turn = {"role": "user", "content": content}
        before = self._rendered([turn], add_generation_prompt=True)
        if answer is None:
            return before, None
        return before, self._turn(turn, before, answer.strip())

    def _turn(self, turn: Mapping[str, Any], before: str, answer: str) -> str:
        """The model's turn as the template writes it: what leads to the answer, the answer, what ends it."""
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        whole = self._rendered([turn, reply], add_generation_prompt=False)
        rest = whole.removeprefix(before)
        if rest == whole or answer not in rest:  # the template writes a finished turn otherwise than one that begins
            return answer if before[-1:].isspace() else f" {answer}"
        return rest.rstrip()

    def _ends_turn(self, text: str) -> bool:
        """Whether a text closes with a special token that ends a turn."""
        return any(token and text.endswith(token) for token in self.tokenizer.all_special_tokens)

    def _rendered(self, turns: list[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return self.reader.apply_chat_template(turns, add_generation_prompt=add_generation_prompt, tokenize=False)
        except Exception as error:  # a template is a program of its own
            raise UserError(
                f"model.path: the chat template of {self.config.model.path} fails: {' '.join(str(error).split())}"
            ) from error

    def _misplaced(self, question: Question, slots: int) -> UserError:
        images, token = len(question.images), self.reader.image_token
        given = f"{question.where} has {images} {'image' if images == 1 else 'images'}"
        if slots == 0 and not question.chat:
            return UserError(
                f"data: {given}, and its template has no place for one; put {token} into its prompt, or leave template "
                "out for the processor's own"
            )
        if slots == 0:
            return UserError(
                f"model.path: {given}, and the chat template of {self.config.model.path} writes none; use a processor "
                "whose template has images"
            )
        return UserError(f"data: {given} for {slots} × {token} in its text; give one {token} for each image, or none")

    # -- answers -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, model: "nn.Module", examples: Sequence[Question], batch_size: int) -> list[str]:
        """The model's greedy answer to each question, at most `ANSWER_TOKENS` tokens."""
        from transformers import GenerationConfig

        asked = [replace(example, answers=()) for example in examples]
        rows = [self._row(question, None) for question in asked]
        for question, row in zip(asked, rows, strict=True):
            if len(row.input_ids) + ANSWER_TOKENS > self.context:
                raise UserError(
                    f"eval: {question.where} has {len(row.input_ids)} tokens, and the model reads {self.context} at "
                    f"most, of which {ANSWER_TOKENS} are for the answer; leave it out"
                )
        if hasattr(model, "answer"):  # an engine (`harness.evaluation.visual_engine`)
            short = [(self._tokens(question)[0], question.images) for question in asked]
            return model.answer(short, ANSWER_TOKENS, [self.turn_end])
        device, own = next(model.parameters()).device, getattr(model, "generation_config", None)
        ends = getattr(own, "eos_token_id", None) or self.tokenizer.eos_token_id
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=ANSWER_TOKENS,
            eos_token_id=sorted({self.turn_end, *(ends if isinstance(ends, list) else [ends])}),
            pad_token_id=self.pad_id,
        )
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place].input_ids))
        answers = [""] * len(rows)
        model.eval()
        for start in progress(range(0, len(order), batch_size), "answer"):
            places = order[start : start + batch_size]
            batch = collate([replace(rows[place], labels=[]) for place in places], self.pad_id, side="left")
            batch.pop("labels", None)
            inputs = {name: tensor.to(device) for name, tensor in batch.items()}
            found = model.generate(**inputs, generation_config=greedy)[:, inputs["input_ids"].shape[1] :]
            for place, text in zip(places, self.tokenizer.batch_decode(found, skip_special_tokens=True), strict=True):
                answers[place] = text.strip()
        return answers

    def score(self, metric: str, predictions: Sequence[str], examples: Sequence[Question]) -> list[float] | float:
        """A metric of `harness.evaluation.visual_metrics`, by the name of its function; ``pope_f1`` and the like.

        Raises:
            UserError: a question lacks what the metric compares with (a right answer, options, ten answers).
        """
        unanswered = next((example for example in examples if not example.answers), None)
        if unanswered is not None:
            raise UserError(f"eval: {unanswered.where} has no right answer; name the column of answers (response)")
        try:
            if metric.startswith(_POPE):
                expected = [example.answers[0] for example in examples]
                return visual_metrics.pope(predictions, expected)[metric.removeprefix(_POPE)]
            if metric in ("multiple_choice", "circular_accuracy"):
                scores = [
                    visual_metrics.multiple_choice(answer, example.options, _correct(example))
                    for answer, example in zip(predictions, examples, strict=True)
                ]
                if metric == "multiple_choice":
                    return scores
                return visual_metrics.circular_accuracy(scores, [_unturned(example) for example in examples])
            function = getattr(visual_metrics, metric)
            return [function(answer, example.answers) for answer, example in zip(predictions, examples, strict=True)]
        except ValueError as error:
            raise UserError(f"eval: {metric} of task 'image_text' cannot be taken: {error}") from error

    def shown(self, example: Question, prediction: str) -> Shown:
        """As texts; of several right answers each once, the most frequent first."""
        expected = " | ".join(answer for answer, _ in Counter(example.answers).most_common())
        return Shown(example.prompt, expected, prediction)


@cache
def _say_there_is_no_template(path: str, image_token: str) -> None:
    """Said once, however often the processor is loaded."""
    say(
        f"model.path: {path} has no chat template; rows are written as LLaVA-1.5 reads them: "
        f"USER: {image_token}\\n… ASSISTANT: …"
    )


def _folder(source: SourceConfig) -> Path:
    """Where relative paths of images start: ``image_folder``, or where the data file is."""
    if source.image_folder is not None:
        return Path(source.image_folder)
    path = Path(source.path)
    return path.parent if path.is_file() else path if path.is_dir() else Path()


def _options(values: Sequence[Any]) -> tuple[str, ...]:
    """The options of a row: of one column that lists them, or of a column each; empty ones at the end are none."""
    if len(values) == 1 and isinstance(values[0], Sequence) and not isinstance(values[0], str):
        values = values[0]
    found = ["" if value is None or str(value) == "nan" else str(value) for value in values]
    while found and not found[-1]:
        found.pop()
    return tuple(found)


def _answers(value: Any, options: Sequence[str]) -> tuple[str, ...]:
    """The right answers of a row; of a question with options the letter of the right one.

    Of several answers the most frequent comes first, of equally frequent ones the earlier.
    """
    if options:
        number = _option(value, options)
        return () if number is None else (LETTERS[number],)
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    texts = [str(one["answer"] if isinstance(one, Mapping) else one) for one in values]
    first = max(texts, key=texts.count, default="")
    return tuple(sorted(texts, key=lambda text: text != first))


def _option(value: Any, options: Sequence[str]) -> int | None:
    """The number of the right option, given as number from 0, as letter, or as its text."""
    if isinstance(value, int):
        return value if 0 <= value < len(options) else None
    text = str(value).strip()
    if text in options:
        return list(options).index(text)
    letter = text.rstrip(".").upper()
    return LETTERS.index(letter) if len(letter) == 1 and letter in LETTERS[: len(options)] else None


def _correct(example: Question) -> int:
    """The number of the right option."""
    return LETTERS.index(example.answers[0])


def _unturned(example: Question) -> tuple[Any, ...]:
    """What the rotations of a question have in common: its text without the options, these as a set, its images."""
    before = example.prompt.partition(f"\n{LETTERS[0]}. ")[0]
    return before, frozenset(example.options), tuple(picture.digest() for picture in example.images)


def _last(ids: Sequence[int], token: int) -> int:
    """The last place of ``token``."""
    return len(ids) - 1 - ids[::-1].index(token)


def _png(side: int) -> bytes:
    """A black image, as the content of a file."""
    import io

    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return file.getvalue()
