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
        adapter: folder of a plain PEFT LoRA, or None for ``model`` itself; with a server it may also be the name under
            which the server offers it.
        merged: folder of the same model merged, for an engine that cannot serve the adapter.
        merge: the engine cannot serve the adapter's rank: it is merged for the time of the evaluation.
    """

    name: str
    step: int | None
    model: str | Path
    adapter: Path | None = None
    merged: Path | None = None
    merge: bool = False


def adapter_rank(adapter: Path) -> int:
    """The largest rank of any layer of a PEFT LoRA (``r`` and ``rank_pattern``)."""
    config = read_json(adapter / "adapter_config.json")
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def servable(candidate: Candidate, backend: str) -> Candidate:
    """The candidate in a form that the engine serves: its adapter, its merged model, or to be merged.

    Raises:
        UserError: the folder holds no adapter, or the engine cannot serve it and there is no merged model.
    """
    adapter = candidate.adapter
    if adapter is None or (backend == "server" and not adapter.is_dir()):
        return candidate
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"eval: {adapter} holds no adapter_config.json; give the folder of a PEFT adapter")
    reason = _why_not(adapter, backend)
    too_large = _why_rank_is_too_large(adapter) if reason is None and backend == "vllm" else None
    if reason is None and too_large is None:
        return candidate
    if candidate.merged is not None:
        say(f"eval: {candidate.name} is evaluated merged: {reason or too_large}")
        return replace(candidate, model=candidate.merged, adapter=None)
    if reason is None:
        say(f"eval: {candidate.name} is merged for the evaluation: {too_large}")
        return replace(candidate, merge=True)
    raise UserError(
        f"eval.backend: {backend} cannot serve {adapter}: {reason}; evaluate the merged model"
        + (", or set eval.backend to hf" if backend == "vllm" and not _of_no_library(adapter) else "")
    )


def _of_no_library(adapter: Path) -> bool:
    return read_json(adapter / "adapter_config.json").get("peft_type") in ("FLORA", "LORA_CONV")


def _why_not(adapter: Path, backend: str) -> str | None:
    """Why the engine cannot serve an adapter, whatever its rank; None if it can."""
    if _of_no_library(adapter):
        return "it adapts convolutions, in a form of its own"
    return _why_vllm_cannot(adapter) if backend == "vllm" else None


def _why_vllm_cannot(adapter: Path) -> str | None:
    config = read_json(adapter / "adapter_config.json")
    if config.get("peft_type", "LORA") != "LORA":
        return f"it is {config['peft_type']}, not LORA"
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        return "it has biases"
    for key in ("use_dora", "modules_to_save", "layer_replication"):
        if config.get(key):
            return f"it has {key}"
    return None


def _why_rank_is_too_large(adapter: Path) -> str | None:
    from harness.evaluation.vllm_engine import lora_ranks

    rank, largest = adapter_rank(adapter), lora_ranks()[-1]
    return f"its rank is {rank}, the largest that vLLM serves is {largest}" if rank > largest else None
