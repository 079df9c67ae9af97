"""The models of an evaluation, and whether an engine can serve their adapters."""

from dataclasses import dataclass, replace
from pathlib import Path

from harness.console import say
from harness.errors import UserError
from harness.files import read_json


@dataclass(frozen=True)
class Candidate:
    """One model to evaluate.

    Attributes:
        name: what it is called in results.
        step: the training step it was saved at; None for the base.
        model: model folder or hub id; the base that ``adapter`` lies on.
        adapter: folder of a plain PEFT LoRA, or None for ``model`` itself.
        merged: folder of the same model merged, for an engine that cannot serve the adapter.
    """

    name: str
    step: int | None
    model: str | Path
    adapter: Path | None = None
    merged: Path | None = None


def adapter_rank(adapter: Path) -> int:
    """The largest rank of any layer of a PEFT LoRA (``r`` and ``rank_pattern``)."""
    config = read_json(adapter / "adapter_config.json")
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def servable(candidate: Candidate, backend: str) -> Candidate:
    """The candidate in a form that the engine serves: its adapter, or its merged model.

    Raises:
        UserError: the folder holds no adapter, or vLLM cannot serve it and there is no merged model.
    """
    if candidate.adapter is None:
        return candidate
    if not (candidate.adapter / "adapter_config.json").is_file():
        raise UserError(f"eval: {candidate.adapter} holds no adapter_config.json; give the folder of a PEFT adapter")
    reason = _why_not(candidate.adapter, backend)
    if reason is None:
        return candidate
    if candidate.merged is not None:
        say(f"eval: {candidate.name} is evaluated merged: {reason}")
        return replace(candidate, model=candidate.merged, adapter=None)
    raise UserError(
        f"eval.backend: {backend} cannot serve {candidate.adapter}: {reason}; evaluate the merged model"
        + (", or set eval.backend to hf" if backend == "vllm" and not _of_no_library(candidate.adapter) else "")
    )


def _of_no_library(adapter: Path) -> bool:
    return read_json(adapter / "adapter_config.json").get("peft_type") in ("FLORA", "LORA_CONV")


def _why_not(adapter: Path, backend: str) -> str | None:
    """Why the engine cannot serve an adapter; None if it can."""
    if _of_no_library(adapter):
        return "it adapts convolutions, in a form of its own"
    return _why_vllm_cannot(adapter) if backend == "vllm" else None


def _why_vllm_cannot(adapter: Path) -> str | None:
    from harness.evaluation.vllm_engine import lora_ranks

    config = read_json(adapter / "adapter_config.json")
    rank, largest = adapter_rank(adapter), lora_ranks()[-1]
    if config.get("peft_type", "LORA") != "LORA":
        return f"it is {config['peft_type']}, not LORA"
    if rank > largest:
        return f"its rank is {rank}, the largest allowed is {largest}"
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        return "it has biases"
    for key in ("use_dora", "modules_to_save", "layer_replication"):
        if config.get(key):
            return f"it has {key}"
    return None
