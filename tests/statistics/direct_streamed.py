"""Small random decoders of many architectures, their statistics block by block, and the gang that collects them so."""

import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from harness.config import ModelConfig
from harness.data.collation import Batch, collate
from harness.data.tokenisation import Row
from harness.models.loading import load_model
from harness.models.targets import target_modules
from harness.models.weights import BaseWeights, empty_model
from harness.statistics.loss import Labels
from harness.statistics.reduction import Reduction
from harness.statistics.resident import collect_resident
from harness.statistics.statistic import KINDS, Kind, Statistic
from harness.statistics.store import StatisticsWriter
from harness.statistics.streamed import collect_streamed
from tests.statistics.direct import PAD
from tests.statistics.direct_gradients import groups_of, labelled_rows
from tests.statistics.forked import run_gangs

COMMON = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
DECODERS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GATED, tie_word_embeddings=False),
    "gemma3": Gemma3TextConfig(**GATED, head_dim=8, sliding_window=6, layer_types=SLIDING),
    "qwen2": Qwen2Config(**GATED, use_sliding_window=True, sliding_window=5, layer_types=SLIDING),
    "opt": OPTConfig(**COMMON, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.3),
    "neox": GPTNeoXConfig(**COMMON, intermediate_size=48, max_position_embeddings=64, tie_word_embeddings=False),
    "falcon": FalconConfig(**COMMON, alibi=True, new_decoder_architecture=False),
    "bloom": BloomConfig(vocab_size=300, hidden_size=32, n_layer=3, n_head=4),
}
Found = dict[tuple[int, Kind, str], Statistic]


def saved(folder: Path, config: PreTrainedConfig, spread: float = 3.0) -> ModelConfig:
    """A random model with outlier channels, on disk; ``spread``: how far its weights are from the usual small ones."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for module in target_modules(model, "all-linear").values():
            module.weight *= spread
            module.weight[0] *= 5
    model.save_pretrained(folder)
    return ModelConfig(path=str(folder), dtype="float32")


def batches_of(rows: list[Row], size: int, start: int = 0, step: int = 1) -> list[Batch]:
    """Padded batches; with ``start`` and ``step``, one rank's."""
    return [collate(rows[i : i + size], PAD) for i in range(0, len(rows), size)][start::step]


def streamed(
    config: ModelConfig,
    rounds: list[list[Batch]],
    kinds: tuple[Kind, ...] = KINDS,
    labels: Labels = Labels(),  # noqa: B008 - frozen
    targets: object = "all-linear",
    reduction: Reduction | None = None,
    prepare: Callable[[PreTrainedModel], object] = lambda model: None,
) -> tuple[Found, dict[str, str]]:
    """What this rank owns, by round, kind and layer, and the groups."""
    model = empty_model(config)
    prepare(model)
    groups: dict[str, str] = {}
    collected = collect_streamed(
        model,
        BaseWeights(config, model),
        target_modules(model, targets),
        rounds,
        collate([Row([3, 4, 5], [])], PAD),
        kinds,
        labels,
        torch.device("cpu"),
        reduction or Reduction(),
        groups,
    )
    with closing(collected):
        found = {(n, kind, name): Statistic(matrix, tokens) for n, kind, name, matrix, tokens in collected}
    assert all(p.is_meta for name in groups for p in model.get_submodule(name).parameters())
    return found, groups


def resident(
    model: PreTrainedModel,
    batches: list[Batch],
    kinds: tuple[Kind, ...] = KINDS,
    labels: Labels = Labels(),  # noqa: B008
) -> dict[tuple[Kind, str], Statistic]:
    """The same with the whole model, on every rank."""
    modules: dict[str, nn.Linear] = target_modules(model, "all-linear")
    collected = collect_resident(
        model, modules, groups_of(model, modules), batches, kinds, labels, Reduction(everywhere=True)
    )
    return {(kind, name): Statistic(matrix, tokens) for kind, name, matrix, tokens in collected}


def left_over() -> list[str]:
    """Threads of ours that live."""
    ours = ("suspended-forward", "load-block", "write-statistics")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(ours)]


def one_rank(number: int, ranks: int, port: int, base: str, folder: Path) -> None:
    """A rank of a gloo gang. Shares differ in size; where there are several ranks the last one has no batch at all."""
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=ranks)
    config = ModelConfig(path=base, dtype="float32")
    working = max(1, ranks - 1)
    rows = labelled_rows(20) if number < working else []
    mine = batches_of(rows, 3, number, working)
    for mode in ("streamed", "resident"):
        reduction = Reduction()
        if mode == "streamed":
            found, groups = streamed(config, [mine, mine[:1]], labels=Labels("mc", 1), reduction=reduction)
        else:
            model = load_model(config)
            modules = target_modules(model, "all-linear")
            groups = groups_of(model, modules)
            collected = collect_resident(model, modules, groups, mine, KINDS, Labels("mc", 1), reduction)
            found = {(0, kind, name): Statistic(matrix, tokens) for kind, name, matrix, tokens in collected}
        with StatisticsWriter(folder / f"{mode}-{ranks}") as writer:
            for (sampling_round, kind, name), statistic in found.items():
                writer.write(kind, name, statistic, sampling_round)
            for sampling_round in sorted({key[0] for key in found} | {0}):
                for kind in KINDS:
                    own = groups if kind == "input_covariance" else {name: name for name in groups}
                    writer.serve(kind, own, sampling_round)
            writer.close(collective=True)
        (folder / f"{mode}-{ranks}" / f"bytes-{number}").write_text(f"{reduction.given} {reduction.taken}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_gangs(one_rank, *sys.argv[1:])
