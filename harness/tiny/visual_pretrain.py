"""A small LLaVA that knows the visual world: a CLIP-style tower, a projector, a Llama, all trained here from nothing.

LLaVA-1.5 (Liu et al., 2024) in small: patch features of the tower's last layer but one, without the class token, go
through a two-layer projector and stand in the text where ``<image>`` stood. So the tower's last layer is never used,
there as here. Training is plain PyTorch on the CPU. First the tower alone learns what it sees, as LLaVA's was trained
before; then projector and Llama learn the old kinds of question, and sentences without an image. The new kind of
question is never seen.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache as remembered
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from harness.console import progress, say
from harness.files import read_json, write_json
from harness.tiny.kept import kept_folder
from harness.tiny.pretrain import save
from harness.tiny.tokenizer import train_tokenizer
from harness.tiny.visual_world import (
    COLOURS,
    KINDS,
    NEW_KIND,
    OLD_KINDS,
    PLACES,
    SHAPES,
    SIDE,
    Scene,
    VisualWorldOptions,
    read_rows,
    scenes,
    sentence,
    vocabulary_text,
    write_world,
)

FORMAT = 1  # part of the cache key: raise it when the same options come to mean another world
IMAGE = "<image>"
# The form in which LLaVA-1.5 is asked: "USER: <image>\nWhat shape is the red thing? ASSISTANT: circle</s>".
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set images = 0 -%}{%- set text = message['content'] -%}
{%- else -%}
{%- set images = message['content'] | selectattr('type', 'equalto', 'image') | list | length -%}
{%- set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}
{{- 'ASSISTANT: ' + text + '</s>' -}}
{%- else -%}
{{- 'USER: ' + '<image>\\n' * images + text + ' ' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
FEATURE_LAYER = -2  # of the tower's hidden states; LLaVA-1.5's
NOT_LEARNT = -100  # the label of a token that carries no loss


@dataclass(frozen=True)
class VisualPretrainOptions:
    """The model's size and how it is trained.

    Attributes:
        hidden, layers, heads, mlp: sizes of the Llama.
        vision_hidden, vision_layers, vision_heads, vision_mlp: sizes of the tower; its last layer is not used.
        patch: side of a patch, in pixels; an image is (size / patch)² tokens.
        positions: the longest sequence, in tokens, that the model is declared to take.
        vocabulary: number of tokens, special tokens and ``<image>`` included.
        tower_steps, tower_images: the tower's own training: steps, and images in each.
        steps: steps of the training of projector and Llama.
        images, questions: each step sees ``images`` images with ``questions`` questions each, in one conversation. One
            is learnt far sooner than several. Two fifths ask for a count, which is learnt last.
        sentences: sentences without an image in each step.
        learning_rate, tower_learning_rate: AdamW's rate at its highest.
        warmup: steps over which the rate rises from 0.
        flat: share of the steps after which it falls, linearly, to 0.
        seed: of the initial weights and of the order of the training data.
    """

    hidden: int = 192
    layers: int = 4
    heads: int = 6
    mlp: int = 512
    vision_hidden: int = 128
    vision_layers: int = 4
    vision_heads: int = 4
    vision_mlp: int = 384
    patch: int = 16
    positions: int = 256
    vocabulary: int = 480
    tower_steps: int = 300
    tower_images: int = 64
    steps: int = 1400
    images: int = 96
    questions: int = 1
    sentences: int = 8
    learning_rate: float = 1e-3
    tower_learning_rate: float = 2e-3
    warmup: int = 50
    flat: float = 0.4
    seed: int = 0


@dataclass(frozen=True)
class VisualOptions:
    """A visual world and the model that knows it; two equal options give the same files."""

    world: VisualWorldOptions = field(default_factory=VisualWorldOptions)
    pretrain: VisualPretrainOptions = field(default_factory=VisualPretrainOptions)


@dataclass(frozen=True)
class VisualWorld:
    """The files of one visual world.

    Attributes:
        model: Hugging Face folder of the pre-trained LLaVA, processor included.
        data_dir: folder of all data; image paths start here. ``<kind>_test.jsonl`` and ``<kind>_train.jsonl`` for
            every kind, columns ``image``, ``question``, ``answer``, ``kind``.
        train: JSONL of the new kind.
        preserve: JSONL of the old kinds, on the same images.
        info: options, counts, seconds, and the model's exact match on the test file of every kind.
    """

    model: Path
    data_dir: Path
    train: Path
    preserve: Path
    info: dict[str, Any]


def build_visual(cache: Path | None = None, options: VisualOptions = VisualOptions()) -> VisualWorld:
    """The visual world of ``options``, made on the first call and taken from ``cache`` afterwards.

    Several processes may ask at once: one builds and the others wait for it. What a killed build left is swept away.

    Args:
        cache: folder of all worlds; by default ``$PALIMPSEST_CACHE`` or ``~/.cache/palimpsest``.
        options: what to build.
    """
    content = {"format": FORMAT, **asdict(options)}
    folder = kept_folder("tiny-visual", content, lambda staging: _write(staging, options), cache)
    data = folder / "data"
    return VisualWorld(
        model=folder / "model",
        data_dir=data,
        train=data / f"{NEW_KIND}_train.jsonl",
        preserve=data / "old_train.jsonl",
        info=read_json(folder / "info.json"),
    )


def small_visual_options(seed: int = 0) -> VisualOptions:
    """A world that is made inside a test; its model has every part of the larger one and has learnt next to nothing."""
    return VisualOptions(
        world=VisualWorldOptions(seed=seed, size=24, train=40, test=20),
        pretrain=VisualPretrainOptions(
            hidden=64,
            layers=2,
            heads=1,
            mlp=128,
            vision_hidden=32,
            vision_layers=2,
            vision_heads=2,
            vision_mlp=64,
            patch=8,
            tower_steps=2,
            tower_images=4,
            steps=4,
            images=4,
            seed=seed,
        ),
    )


def make_processor(options: VisualOptions) -> LlavaProcessor:
    """The processor: an ``<image>`` in a text becomes (size / patch)² tokens, an image as many features.

    The image processor is transformers' own for PIL: the other one needs torchvision. Where torchvision is installed,
    ``AutoProcessor.from_pretrained`` chooses that one for the same folder.
    """
    size, patch = options.world.size, options.pretrain.patch
    tokenizer = train_tokenizer(
        ["USER: \n ASSISTANT:", *vocabulary_text()], options.pretrain.vocabulary - 1, options.pretrain.positions
    )
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the strategy takes away again
        chat_template=CHAT_TEMPLATE,
    )


def initial_model(processor: LlavaProcessor, options: VisualOptions) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights, in fp32."""
    sizes, tokenizer = options.pretrain, processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=sizes.vision_hidden,
        intermediate_size=sizes.vision_mlp,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        projection_dim=sizes.vision_hidden,
        image_size=options.world.size,
        patch_size=sizes.patch,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.mlp,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=sizes.positions,
        initializer_range=sizes.hidden**-0.5,  # at 0.02 so narrow a model takes very long to begin to look at images
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=image_tokens(options),
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state is not ours to change
        torch.manual_seed(sizes.seed)
        model = LlavaForConditionalGeneration(config)
        # CLIP begins with positions forty times smaller than patches; so small, they are not learnt in a few minutes.
        nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.5)
    return model


def image_tokens(options: VisualOptions) -> int:
    """How many tokens an image is."""
    return (options.world.size // options.pretrain.patch) ** 2


def pretrain(
    processor: LlavaProcessor,
    options: VisualOptions,
    watch: Callable[[int, LlavaForConditionalGeneration], None] | None = None,
) -> LlavaForConditionalGeneration:
    """A LLaVA trained on conversations about images that are drawn anew for every step.

    Args:
        processor: of the same options.
        options: sizes and training.
        watch: called after every step with its number and the model.
    """
    settings = options.pretrain
    model = initial_model(processor, options)
    model.set_attn_implementation("eager")  # with so few tokens the plain formula is faster on a CPU
    model.train()
    scale = teach_tower(model.model.vision_tower, processor, options)
    with torch.no_grad():  # where image features are much larger than words', no layer can add anything to them
        model.model.multi_modal_projector.linear_1.weight /= scale
    model.model.vision_tower.requires_grad_(False)  # as in LLaVA
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser, schedule = _optimiser(learning, settings.steps, settings.learning_rate, settings)
    batches = conversations(processor, options)
    for step in progress(range(settings.steps), "pre-training the base model"):
        ids, labels, pixels = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, pixel_values=pixels, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if watch is not None:
            watch(step, model)
    return model.requires_grad_(True).eval()


def teach_tower(tower: nn.Module, processor: LlavaProcessor, options: VisualOptions) -> float:
    """Train the tower to say of every patch what stands there, and where that is; the scale of its features.

    A linear head on the features that the projector will read names shape and colour, or nothing, and the place. It is
    thrown away. The place is in the features of any tower that was trained on images; without it, nothing after the
    tower could learn the new kind of question.
    """
    settings, size = options.pretrain, options.world.size
    shapes, colours = [None, *SHAPES], [None, *COLOURS]
    widths = [len(shapes), len(colours), len(PLACES)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        head = nn.Linear(settings.vision_hidden, sum(widths))
    optimiser, schedule = _optimiser(
        [*tower.parameters(), *head.parameters()], settings.tower_steps, settings.tower_learning_rate, settings
    )
    line = (torch.arange(size // settings.patch) + 0.5) * settings.patch * SIDE // size
    place_of_patch = (SIDE * line[:, None] + line).flatten().long()
    source = scenes(options.world, f"tower {settings.seed}")
    for _ in progress(range(settings.tower_steps), "pre-training the vision tower"):
        shown = [next(source)[0] for _ in range(settings.tower_images)]
        there = torch.zeros(len(shown), len(PLACES), 3, dtype=torch.long)
        there[:, :, 2] = torch.arange(len(PLACES))
        for i, scene in enumerate(shown):
            for thing in scene.things:
                there[i, thing.place, :2] = torch.tensor([shapes.index(thing.shape), colours.index(thing.colour)])
        wanted = there[:, place_of_patch].flatten(0, 1).unbind(-1)
        pixels = normalised(np.stack([scene.draw(size) for scene in shown]), processor.image_processor)
        with torch.autocast("cpu", torch.bfloat16):
            features = tower(pixels, output_hidden_states=True).hidden_states[FEATURE_LAYER][:, 1:]
            said = head(features).float().flatten(0, 1).split(widths, dim=-1)
        pairs = list(zip(said, wanted, strict=True))
        sum(F.cross_entropy(logits, labels) for logits, labels in pairs).backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    tower.zero_grad()
    return features.detach().float().std().item()


def conversations(processor: LlavaProcessor, options: VisualOptions) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches ``(ids, labels, pixels)`` of the old kinds of question and of sentences without an image.

    ``ids`` and ``labels`` have the shape (rows, tokens), padded on the right, ``pixels`` (images, 3, size, size). Of a
    conversation only the answers carry loss, as in LLaVA; of sentences, all tokens.
    """
    settings, tokenizer = options.pretrain, processor.tokenizer
    seed = f"pretraining {settings.seed}"  # a split of its own: other images than those for training and test
    source, draw = scenes(options.world, seed), random.Random(f"{seed} {options.world.seed}")

    @remembered  # there are few different questions and answers
    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def conversation(scene: Scene, order: random.Random) -> tuple[list[int], list[int]]:
        asked = [scene.ask(order.choice((*OLD_KINDS, "count")), order) for _ in range(settings.questions)]
        image = [processor.image_token_id] * image_tokens(options)
        ids = [tokenizer.bos_token_id, *ids_of("USER: "), *image, *ids_of(f"\n{asked[0][0]} ASSISTANT:")]
        labels = [NOT_LEARNT] * len(ids)
        for i, (question, answer) in enumerate(asked):
            before = ids_of(f"USER: {question} ASSISTANT:") if i else []
            after = [*ids_of(f" {answer}"), tokenizer.eos_token_id]
            ids += before + after
            labels += [NOT_LEARNT] * len(before) + after
        return ids, labels

    def sentences(count: int) -> list[int]:
        ids = []
        for _ in range(count):
            ids += [tokenizer.bos_token_id, *ids_of(sentence(draw)), tokenizer.eos_token_id]
        return ids

    while True:
        shown = [next(source) for _ in range(settings.images)]
        rows = [conversation(scene, order) for scene, order in shown]
        text = [sentences(min(4, settings.sentences - done)) for done in range(0, settings.sentences, 4)]
        rows += [(ids, ids) for ids in text]  # of several sentences, a row is about as long as a conversation
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [NOT_LEARNT] * (longest - len(labels)) for _, labels in rows])
        images = np.stack([scene.draw(options.world.size) for scene, _ in shown])
        yield ids, labels, normalised(images, processor.image_processor)


def _optimiser(
    parameters: Iterable[nn.Parameter], steps: int, rate: float, settings: VisualPretrainOptions
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW whose rate rises, stays and falls to 0 over ``steps``."""
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
    falling = steps * (1.0 - settings.flat)
    return optimiser, torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / settings.warmup, 1.0, (steps - step) / falling)
    )


def normalised(images: np.ndarray, image_processor: CLIPImageProcessorPil) -> Tensor:
    """What the image processor makes of ``images``, uint8 of shape (n, size, size, 3): shape (n, 3, size, size)."""
    mean, deviation = (torch.tensor(getattr(image_processor, name)) for name in ("image_mean", "image_std"))
    return ((torch.from_numpy(images).float() / 255 - mean) / deviation).permute(0, 3, 1, 2).contiguous()


def messages(question: str, images: int = 1) -> list[dict[str, Any]]:
    """A question about images as a chat template takes it."""
    content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


@torch.inference_mode()
def exact_match(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    rows: Sequence[dict[str, str]],
    folder: Path,
    batch_size: int = 125,
) -> float:
    """Share of ``rows`` whose greedy answer is a space, the answer, and then EOS.

    One forward pass instead of generation: greedy decoding gives an answer if and only if the model, fed with
    that answer, ranks every one of its tokens first.

    Args:
        model, processor: a LLaVA and what makes its inputs.
        rows: columns ``image``, ``question``, ``answer``.
        folder: where image paths start.
    """
    tokenizer, correct = processor.tokenizer, 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        answers = [f" {row['answer']}{tokenizer.eos_token}" for row in batch]
        prompts = [
            processor.apply_chat_template(messages(row["question"]), add_generation_prompt=True) for row in batch
        ]
        inputs = processor(
            images=[Image.open(folder / row["image"]) for row in batch],
            text=[prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        first = model(**inputs, use_cache=False).logits.argmax(-1)
        lengths = inputs["attention_mask"].sum(-1).tolist()
        expected = tokenizer(answers, add_special_tokens=False)["input_ids"]
        for predicted, length, wanted in zip(first, lengths, expected, strict=True):
            correct += predicted[length - len(wanted) - 1 : length - 1].tolist() == wanted
    return correct / len(rows)


def _write(folder: Path, options: VisualOptions) -> None:
    started = time.monotonic()
    say(f"building the visual world: {options.world.train + options.world.test} images, once")
    counts = write_world(folder / "data", options.world)
    processor = make_processor(options)
    model = pretrain(processor, options)
    save(model, processor.tokenizer, folder / "model")
    processor.save_pretrained(folder / "model")
    trained = time.monotonic()
    scores = {
        kind: exact_match(model, processor, read_rows(folder / "data" / f"{kind}_test.jsonl"), folder / "data")
        for kind in KINDS
    }
    info = {
        "options": asdict(options),
        "counts": {
            **counts,
            "tokens": len(processor.tokenizer),
            "image_tokens": image_tokens(options),
            "parameters": model.num_parameters(),
        },
        "exact_match": scores,
        "seconds": round(trained - started, 1),
    }
    write_json(folder / "info.json", info)
