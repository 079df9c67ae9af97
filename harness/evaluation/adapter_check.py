"""Whether an adapter belongs to a base model: by names and shapes of layers, before an engine is started."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, Conv1D, PretrainedConfig

from harness.console import say
from harness.errors import UserError
from harness.evaluation.text_model import load_config
from harness.files import read_json
from harness.models.loading import whole_weights

_PREFIX = "base_model.model."
_FORMS = {  # A and B as PEFT names them, and whether they multiply as (in → r → out) or lie the other way round
    "lora_A.weight": ("A", False),
    "lora_B.weight": ("B", False),
    "lora_embedding_A": ("A", True),
    "lora_embedding_B": ("B", True),
}


@dataclass
class _Pair:
    """Shapes of one layer's factors: A (r, in), B (out, r); of an embedding A (r, tokens), B (width, r)."""

    embedding: bool = False
    A: tuple[int, ...] | None = None
    B: tuple[int, ...] | None = None


class BaseLayers:
    """The layers of a base model, built without weights from its configuration.

    Raises:
        UserError: the model has no readable configuration, or is no causal language model.
    """

    def __init__(self, model: str | Path) -> None:
        self.model = str(model)
        config: PretrainedConfig = load_config(self.model)
        try:
            with whole_weights(), torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except ValueError as error:
            raise UserError(f"model.path: {self.model!r} is no language model: {error}".splitlines()[0]) from error
        self.modules: dict[str, nn.Module] = dict(empty.named_modules())

    def check(self, adapter: Path) -> None:
        """Nothing where ``adapter`` (a folder of a PEFT LoRA) fits.

        A base of another name with the same layers is said in one line: its adapter would be computed with and may mean
        nothing.

        Raises:
            UserError: a layer of the adapter is missing in the base or has another shape there; or no weights.
        """
        named = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
        pairs = _pairs(_shapes(adapter))
        wrong = [reason for layer, pair in pairs.items() if (reason := self._why_not(layer, pair)) is not None]
        if wrong:
            raise UserError(
                f"eval: the adapter {adapter} is not for {self.model}: {wrong[0]} ({len(wrong)} of {len(pairs)} layers "
                f"do not fit); evaluate it on the model it was trained on{f', {named}' if named else ''}"
            )
        if named and Path(named).name != Path(self.model).name:
            say(f"eval: warning: {adapter} was trained on {named}; it is evaluated on {self.model}, whose layers fit")

    def _why_not(self, layer: str, pair: _Pair) -> str | None:
        module = self.modules.get(layer)
        if module is None:
            return f"there is no layer {layer} in the base"
        weight = getattr(module, "weight", None)
        if pair.A is None or pair.B is None:
            return f"{layer} has only one of its two factors"
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or len(pair.A) != 2 or len(pair.B) != 2:
            return None  # convolutions and stacked experts: the engine knows better
        outer, inner = weight.shape
        if pair.embedding or isinstance(module, Conv1D):
            outer, inner = inner, outer
        found = (pair.B[0], pair.A[1])
        if found != (outer, inner):
            return f"{layer} is {found[0]} × {found[1]} in the adapter and {outer} × {inner} in the base"
        if pair.B[1] != pair.A[0]:
            return f"{layer} has factors of ranks {pair.A[0]} and {pair.B[1]}"
        return None


def _shapes(adapter: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of an adapter, from the header of its file where it is safetensors."""
    path, older = adapter / "adapter_model.safetensors", adapter / "adapter_model.bin"
    try:
        if path.is_file():
            with safe_open(path, framework="pt") as tensors:
                return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        if older.is_file():
            loaded = torch.load(older, map_location="meta", weights_only=True)
            return {key: tuple(tensor.shape) for key, tensor in loaded.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"eval: {path} cannot be read: {error}; export the adapter again") from error
    raise UserError(f"eval: {adapter} holds no adapter_model.safetensors; give the folder of a PEFT adapter")


def _pairs(shapes: dict[str, tuple[int, ...]]) -> dict[str, _Pair]:
    pairs: dict[str, _Pair] = {}
    for key, shape in shapes.items():
        for ending, (factor, embedding) in _FORMS.items():
            if key.endswith(f".{ending}"):
                pair = pairs.setdefault(key.removeprefix(_PREFIX).removesuffix(f".{ending}"), _Pair(embedding))
                setattr(pair, factor, shape)
    return pairs
