"""Small encoders that know the embedded world's text, and data sets about that world for the tasks of encoders.

A RoBERTa and a DeBERTa-v3, random weights pre-trained briefly to fill in masked tokens of the world's sentences. What
they learn downstream is in JSONL files: the kind of a fact (five classes), whether a sentence is of the kind that
answers a question (two texts), how much of a text is about people (a number from 0 to 5), answers as spans of a few
sentences, some of which are not there (SQuAD's form). And sentences that are to be kept.
"""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.console import progress, say
from harness.files import read_json, write_json, write_jsonl
from harness.tiny.kept import kept_folder
from harness.tiny.world import Fact, World, WorldOptions, generic_sentence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Family = Literal["roberta", "deberta"]
FORMAT = 1  # part of the cache key: raise it when the same options come to mean other files
PEOPLE = ("birthplace", "trade")  # relations that people have
SENTENCES = 3  # of the texts that numbers are about


@dataclass(frozen=True)
class EncoderOptions:
    """Everything that a small encoder and its data are made from; two equal options give the same.

    Attributes:
        world: what there is to know.
        vocabulary: number of tokens, special tokens included.
        hidden, layers, heads, mlp: sizes.
        spread: standard deviation of the initial weights; with the usual 0.02 a model this small learns nothing for
            hundreds of steps.
        positions: the longest sequence, in tokens.
        steps, rows: of pre-training; each step sees ``rows`` texts.
        sentences: of a text, at most.
        learning_rate: AdamW's rate at its highest.
        masked: share of the tokens that are masked.
        train, test: rows of every data set; test rows are about facts that no train row is about.
        seed: of weights, masks and data.
    """

    world: WorldOptions = field(default_factory=lambda: WorldOptions(facts=140, generic=100))
    vocabulary: int = 450
    hidden: int = 96
    layers: int = 2
    heads: int = 4
    mlp: int = 256
    spread: float = 0.05
    positions: int = 128
    steps: int = 600
    rows: int = 48
    sentences: int = 3
    learning_rate: float = 3e-3
    masked: float = 0.25
    train: int = 600
    test: int = 120
    seed: int = 0


@dataclass(frozen=True)
class TinyEncoder:
    """The files of one small encoder.

    Attributes:
        model: Hugging Face folder of the masked language model, tokenizer included.
        data: folder of the data sets, ``<name>_train.jsonl`` and ``<name>_test.jsonl``: ``kinds`` (columns ``text``,
            ``label``), ``pairs`` (``first``, ``second``, ``label``), ``numbers`` (``text``, ``number``), ``spans``
            (``question``, ``context``, ``answers``); and ``sentences.jsonl`` (``text``).
        info: options, counts, seconds, and the share of masked tokens that the model fills in.
    """

    model: Path
    data: Path
    info: dict[str, Any]


def build_encoder(family: Family, cache: Path | None = None, options: EncoderOptions | None = None) -> TinyEncoder:
    """The small encoder of ``family``, made on the first call and taken from ``cache`` afterwards.

    Several processes may ask at once: one builds and the others wait for it.

    Args:
        cache: folder of all worlds; by default ``$PALIMPSEST_CACHE`` or ``~/.cache/palimpsest``.
    """
    options = options or EncoderOptions()
    content = {"format": FORMAT, "family": family, **asdict(options)}
    folder = kept_folder(f"tiny-{family}", content, lambda staging: _write(staging, family, options), cache)
    return TinyEncoder(folder / "model", folder / "data", read_json(folder / "info.json"))


def _write(folder: Path, family: Family, options: EncoderOptions) -> None:
    from transformers.utils import logging as transformers_logging

    from harness.training.distributed import name_accelerator

    started = time.monotonic()
    world = World(options.world)
    counts = {}
    for name, rows in data_sets(world, options).items():
        write_jsonl(folder / "data" / f"{name}.jsonl", rows)
        counts[name] = len(rows)
    say(f"building a small {family}, once")
    tokenizer = train_tokenizer(family, [*world.sample_text(), *(fact.question for fact in world.facts)], options)
    model = pretrain(initial_model(family, tokenizer, options), tokenizer, world, options)
    transformers_logging.disable_progress_bar()
    name_accelerator()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    info = {
        "family": family,
        "options": asdict(options),
        "counts": {**counts, "tokens": len(tokenizer), "parameters": model.num_parameters()},
        "masked_accuracy": masked_accuracy(model, tokenizer, world, options),
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(folder / "info.json", info)


# -- data --------------------------------------------------------------------------------------------------------------


def data_sets(world: World, options: EncoderOptions) -> dict[str, list[dict[str, Any]]]:
    """The rows of every file by its name. What is asked of a fact in a test file is asked of it in no train file."""
    draw = random.Random(f"encoders {options.seed}")
    facts = list(world.facts)
    draw.shuffle(facts)
    cut = len(facts) // 5
    found: dict[str, list[dict[str, Any]]] = {"sentences": [{"text": text} for text in _sentences(world, options)]}
    for split, count, some in (("train", options.train, facts[cut:]), ("test", options.test, facts[:cut])):
        made = [draw.choice(some) for _ in range(count)]
        found[f"kinds_{split}"] = [{"text": _statement(fact, draw), "label": fact.relation.name} for fact in made]
        found[f"pairs_{split}"] = [_pair(fact, some, draw) for fact in made]
        found[f"numbers_{split}"] = [_number(some, draw) for _ in range(count)]
        found[f"spans_{split}"] = [_span(some, draw) for _ in range(count)]
    return found


def _sentences(world: World, options: EncoderOptions) -> Iterator[str]:
    """Texts of one to ``sentences`` of the world's sentences each."""
    texts = world.sample_text()
    draw = random.Random(f"sentences {options.seed}")
    for _ in range(options.test):
        yield " ".join(draw.sample(texts, draw.randint(1, options.sentences)))


def _statement(fact: Fact, draw: random.Random) -> str:
    return draw.choice(fact.statements)


def _pair(fact: Fact, facts: Sequence[Fact], draw: random.Random) -> dict[str, Any]:
    """A question and a sentence; whether the sentence is of the kind that answers such a question."""
    answers = draw.random() < 0.5
    others = [other for other in facts if (other.relation is fact.relation) == answers]
    sentence = _statement(fact if answers else draw.choice(others or list(facts)), draw)
    return {"first": fact.question, "second": sentence, "label": int(answers)}


def _number(facts: Sequence[Fact], draw: random.Random) -> dict[str, Any]:
    """A few sentences, and how much of that is about people, from 0 to 5."""
    wanted = [draw.random() < 0.5 for _ in range(SENTENCES)]
    texts = [
        _statement(draw.choice([fact for fact in facts if (fact.relation.name in PEOPLE) == people]), draw)
        for people in wanted
    ]
    return {"text": " ".join(texts), "number": round(5 * sum(wanted) / SENTENCES, 2)}


def _span(facts: Sequence[Fact], draw: random.Random) -> dict[str, Any]:
    """A question about a fact, and sentences about everyday things; in four of five the fact is among them."""
    fact = draw.choice(facts)
    context = [generic_sentence(draw) for _ in range(2)]
    answers: dict[str, list[Any]] = {"text": [], "answer_start": []}
    if draw.random() < 0.8:
        statement, place = _statement(fact, draw), draw.randrange(3)
        begin = sum(len(text) + 1 for text in context[:place])
        context.insert(place, statement)
        answers = {"text": [fact.answer], "answer_start": [begin + statement.rindex(fact.answer)]}
    return {"question": fact.question, "context": " ".join(context), "answers": answers}


# -- the model ---------------------------------------------------------------------------------------------------------


def train_tokenizer(family: Family, texts: Sequence[str], options: EncoderOptions) -> "PreTrainedTokenizerFast":
    """A tokenizer in the form of the family: byte-level BPE as RoBERTa's, or unigrams as DeBERTa-v3's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    begin, end = ("<s>", "</s>") if family == "roberta" else ("[CLS]", "[SEP]")
    pad, unknown, mask = ("<pad>", "<unk>", "<mask>") if family == "roberta" else ("[PAD]", "[UNK]", "[MASK]")
    special = [begin, pad, end, unknown, mask]
    digits = pre_tokenizers.Digits(individual_digits=True)
    if family == "roberta":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        core.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=options.vocabulary,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
    else:
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.Metaspace()])
        core.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=options.vocabulary, special_tokens=special, unk_token=unknown, show_progress=False
        )
    core.train_from_iterator(texts, trainer)
    middle = f"{end} {end}" if family == "roberta" else end
    second = "" if family == "roberta" else ":1"
    core.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}",
        pair=f"{begin} $A {middle} $B{second} {end}{second}",
        special_tokens=[(token, core.token_to_id(token)) for token in (begin, end)],
    )
    names = (
        ["input_ids", "attention_mask"] if family == "roberta" else ["input_ids", "token_type_ids", "attention_mask"]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=begin,
        eos_token=end,
        cls_token=begin,
        sep_token=end,
        pad_token=pad,
        unk_token=unknown,
        mask_token=mask,
        model_max_length=options.positions,
        model_input_names=names,
        clean_up_tokenization_spaces=False,
    )


def initial_model(family: Family, tokenizer: "PreTrainedTokenizerFast", options: EncoderOptions) -> "PreTrainedModel":
    """A masked language model of random weights, fp32."""
    import torch
    from transformers import DebertaV2Config, DebertaV2ForMaskedLM, RobertaConfig, RobertaForMaskedLM

    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "intermediate_size": options.mlp,
        "initializer_range": options.spread,
        "hidden_dropout_prob": 0.0,  # so that what is computed does not depend on how many ranks compute it
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    with torch.random.fork_rng(devices=[]):  # the caller's random state is not ours to change
        torch.manual_seed(options.seed)
        if family == "roberta":
            positions = options.positions + tokenizer.pad_token_id + 1  # RoBERTa counts from there
            return RobertaForMaskedLM(RobertaConfig(**common, max_position_embeddings=positions, type_vocab_size=1))
        return DebertaV2ForMaskedLM(
            DebertaV2Config(
                **common,
                max_position_embeddings=options.positions,
                type_vocab_size=0,
                relative_attention=True,
                position_buckets=16,
                norm_rel_ebd="layer_norm",
                share_att_key=True,
                pos_att_type=["p2c", "c2p"],
                position_biased_input=False,
                pooler_hidden_size=options.hidden,
            )
        )


def pretrain(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", world: World, options: EncoderOptions
) -> "PreTrainedModel":
    """The model after masked-language modelling on the world's sentences, new masks at every step."""
    import torch
    from torch import nn

    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01, fused=True)
    warmup = max(1, options.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / warmup, (options.steps - step) / max(1, options.steps - warmup)),
    )
    texts = _texts(world, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        for _ in progress(range(options.steps), f"pre-training the small {model.config.model_type}"):
            batch = masked_batch([next(texts) for _ in range(options.rows)], tokenizer, options)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
            wanted = batch["labels"] != -100
            nn.functional.cross_entropy(logits[wanted].float(), batch["labels"][wanted]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
    return model.eval()


def masked_accuracy(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", world: World, options: EncoderOptions
) -> float:
    """The share of masked tokens of ``sentences.jsonl`` that the model fills in."""
    import torch

    right = total = 0
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(options.seed + 1)
        batch = masked_batch(list(_sentences(world, options)), tokenizer, options)
        logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        wanted = batch["labels"] != -100
        right += int((logits[wanted].argmax(-1) == batch["labels"][wanted]).sum())
        total += int(wanted.sum())
    return round(right / total, 4)


def masked_batch(texts: list[str], tokenizer: "PreTrainedTokenizerFast", options: EncoderOptions) -> dict[str, Any]:
    """Texts with a share of their tokens masked, which are the labels; drawn by torch's own generator."""
    import torch

    encoded = tokenizer(
        texts, truncation=True, max_length=options.positions, padding=True, return_special_tokens_mask=True
    )
    ids = torch.tensor(encoded["input_ids"])
    ordinary = ~torch.tensor(encoded["special_tokens_mask"]).bool()
    chosen = ordinary & (torch.rand(ids.shape) < options.masked)
    fate = torch.rand(ids.shape)
    masked = ids.masked_fill(chosen & (fate < 0.8), tokenizer.mask_token_id)
    swapped = chosen & (fate >= 0.9)
    masked = torch.where(swapped, torch.randint(5, len(tokenizer), ids.shape), masked)
    batch = {"input_ids": masked, "attention_mask": torch.tensor(encoded["attention_mask"])}
    return batch | {"labels": ids.masked_fill(~chosen, -100)}


def _texts(world: World, options: EncoderOptions) -> Iterator[str]:
    """Endless texts; every second one is a single sentence, the others have up to ``sentences``."""
    draw = random.Random(f"texts {options.seed}")
    for epoch in world.epochs():
        while epoch:
            count = 1 if draw.random() < 0.5 else draw.randint(2, options.sentences)
            yield " ".join(epoch[:count])
            epoch = epoch[count:]
