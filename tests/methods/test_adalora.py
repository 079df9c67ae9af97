"""AdaLoRA: sensitivities, masks and penalty against float64 from the paper; states; training, killed and resumed."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from harness.adapters.lora import load_tensors
from harness.config import resolve
from harness.errors import UserError
from harness.files import read_json
from harness.methods.adalora import AdaLoRA, AdaLoRAOptions
from harness.methods.base import LowRank
from harness.methods.registry import build_method
from harness.models.targets import Layer
from harness.stages.train import build_model
from harness.training.checkpoint import trained_parameters
from tests.conftest import run_gang
from tests.methods.runs import base_model, largest, logits, perturb, prompts, step_zero
from tests.training.test_runs import alone, equal, kill_after, largest_difference, trained

METHOD = {"name": "adalora", "init_r": 6, "target_r": 3, "tinit": 1, "tfinal": 2}
STEPS, LAYERS = 8, 14


class Training:
    """A model with AdaLoRA, trained on a fixed batch by AdamW, hooks called as the trainer calls them."""

    def __init__(self, config: dict[str, Any], **options: Any) -> None:
        self.config, self.run = step_zero(config, METHOD | options, "run")
        self.method = build_method(self.config.method, 0)
        assert isinstance(self.method, AdaLoRA)
        self.method.set_steps(STEPS)
        self.model = build_model(self.config, self.run, self.method, None, needs_original=False)
        assert isinstance(self.model, PeftModel)
        groups = self.method.param_groups(self.model, 1e-2, 0.0)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(trained_parameters(self.model))

    def steps(self, first: int, last: int) -> Iterator[tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
        """Take the steps; before each one's end, its number, the weights and the gradients that it started from."""
        batch = prompts()
        for step in range(first, last + 1):
            output = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = torch.nn.functional.cross_entropy(
                output[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
            )
            (loss + self.method.penalty(self.model)).backward()
            weights = {name: p.detach().double() for name, p in self.parameters().items()}
            gradients = {name: p.grad.double() for name, p in self.parameters().items()}
            self.method.before_step(self.model, step)
            self.optimizer.step()
            self.method.after_step(self.model)
            yield step, weights, gradients
            self.optimizer.zero_grad()


def budget(step: int, tinit: int, tfinal: int) -> int:
    """b(t), from 6 to 3 a layer, cubic in between; whole ranks, rounded down (Eq. 12)."""
    if step <= tinit:
        return 6 * LAYERS
    if step >= STEPS - tfinal:
        return 3 * LAYERS
    remaining = 1 - (step - tinit) / (STEPS - tfinal - tinit)
    return int(3 * LAYERS + 3 * LAYERS * remaining**3)


@pytest.mark.parametrize("delta", [1, 2])
def test_masks_against_float64(base_config: dict[str, Any], delta: int) -> None:
    """Eq. 8 to 11, and the order of Algorithm 1; the last allocation goes by the averages of the step before."""
    training = Training(base_config, deltaT=delta, beta1=0.8, beta2=0.7)
    averages: dict[str, torch.Tensor] = {}
    variations: dict[str, torch.Tensor] = {}
    masked: dict[str, torch.Tensor] = {}
    allocations = 0
    for step, weights, gradients in training.steps(1, STEPS):
        if step < STEPS - 2:
            for name, weight in weights.items():
                sensitivity = (weight * gradients[name]).abs()
                averages[name] = 0.8 * averages.get(name, torch.zeros_like(weight)) + 0.2 * sensitivity
                change = (sensitivity - averages[name]).abs()
                variations[name] = 0.7 * variations.get(name, torch.zeros_like(weight)) + 0.3 * change
        allocates = (1 < step < STEPS - 2 and step % delta == 0) or step == STEPS - 2
        if allocates:
            allocations += 1
            scores = {}
            for name in (key.removesuffix(".lora_E") for key in weights if key.endswith(".lora_E")):
                s = {kind: averages[f"{name}.lora_{kind}"] * variations[f"{name}.lora_{kind}"] for kind in "ABE"}
                for i in range(6):
                    triplet = s["E"][i, 0] + s["A"][i].mean() + s["B"][:, i].mean()
                    scores[name, i] = float(triplet)
            order = sorted(scores, key=scores.__getitem__, reverse=True)
            best = set(order[: budget(step, 1, 2)])
            masked = {
                name: torch.tensor([(name, i) not in best for i in range(6)]) for name in {layer for layer, _ in order}
            }
        for name, mask in masked.items():
            values = training.parameters()[f"{name}.lora_E"].flatten()
            if allocates or step > STEPS - 2:
                assert torch.equal(values == 0, mask), (step, name)
            elif mask.any():  # between allocations they come back
                assert bool((values[mask] != 0).any())
    assert allocations == {1: 5, 2: 3}[delta]
    kept = sum(int((p != 0).sum()) for name, p in training.parameters().items() if name.endswith(".lora_E"))
    assert kept == 3 * LAYERS
    counts = {int((p != 0).sum()) for name, p in training.parameters().items() if name.endswith(".lora_E")}
    assert len(counts) > 1  # ranks moved between layers


def test_penalty_against_float64(base_config: dict[str, Any]) -> None:
    training = Training(base_config, orth_reg_weight=0.3)
    perturb(training.model, 0.1)
    found = training.method.penalty(training.model)
    found.backward()
    terms, gradients = [], {}
    for name, parameter in training.parameters().items():
        if name.endswith(".lora_E"):
            continue
        M = parameter.detach().double().requires_grad_()
        gram = M @ M.T if name.endswith(".lora_A") else M.T @ M
        terms.append(((gram - torch.eye(6, dtype=torch.float64)) ** 2).sum().sqrt())
        gradients[name] = M
    expected = 0.3 * sum(terms) / len(terms)
    expected.backward()
    assert len(terms) == 2 * LAYERS
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, M in gradients.items():
        assert torch.allclose(training.parameters()[name].grad.double(), M.grad, atol=1e-7), name


@pytest.mark.parametrize("tfinal", [2, 5])  # checkpoint 4 lies before the last allocation, and after it
def test_going_on_from_a_state_is_equal_bit_for_bit(base_config: dict[str, Any], tfinal: int) -> None:
    whole = Training(base_config, tfinal=tfinal)
    for _ in whole.steps(1, 4):
        pass
    tensors = [(name, p.detach().clone()) for name, p in whole.parameters().items()]
    state = {name: value.clone() for name, value in whole.method.state(whole.model).items()}
    optimizer = whole.optimizer.state_dict()
    optimizer = {**optimizer, "state": {k: {n: v.clone() for n, v in s.items()} for k, s in optimizer["state"].items()}}
    assert any(name.startswith("kept/") for name in state)
    assert any(name.startswith("exp_avg_ipt/") for name in state) == (tfinal == 2)
    for _ in whole.steps(5, STEPS):
        pass

    resumed = Training(base_config, tfinal=tfinal)
    load_tensors(resumed.model, tensors)
    resumed.optimizer.load_state_dict(optimizer)
    resumed.method.load_state(resumed.model, state)
    for _ in resumed.steps(5, STEPS):
        pass
    for name, parameter in whole.parameters().items():
        assert torch.equal(parameter, resumed.parameters()[name]), name


def test_update_against_float64() -> None:
    generator = torch.Generator().manual_seed(2)
    A, B = torch.randn(6, 30, generator=generator), torch.randn(20, 6, generator=generator)
    E = torch.tensor([1.0, 0.0, -2.0, 0.0, 0.5, 0.0]).unsqueeze(1)
    method = AdaLoRA(AdaLoRAOptions(init_r=6, target_r=3, alpha=9.0))
    update = method.update({"lora_A": A, "lora_B": B, "lora_E": E}, None)
    assert isinstance(update, LowRank)
    assert update.A.shape == (3, 30)
    expected = sum(float(E[i]) * torch.outer(B[:, i].double(), A[i].double()) for i in range(6)) * 9 / (6 + 1e-5)
    assert torch.allclose(update.dense().double(), expected, atol=1e-5)
    nothing = method.update({"lora_A": A, "lora_B": B, "lora_E": 0 * E}, None)
    assert isinstance(nothing, LowRank)
    assert nothing.A.shape == (0, 30)


def test_step_0(base_config: dict[str, Any]) -> None:
    """In bf16 too, where PEFT would make the rank that it divides by a trained parameter."""
    for dtype, bound in (("float32", 0.0), ("bfloat16", 0.0)):
        base_config["model"]["dtype"] = dtype
        training = Training(base_config)
        assert largest(logits(training.model.eval()), logits(base_model(training.config))) <= bound
        assert len(training.parameters()) == 3 * LAYERS
        assert training.method.penalty(training.model).item() > 0
        assert read_json(training.run.init / "adapter_config.json")["peft_type"] == "ADALORA"
        shutil.rmtree(training.run.path)


def test_start_depends_on_seed_and_layer_alone() -> None:
    layer = Layer("model.layers.0.mlp.up_proj", 64, 100)

    def start(seed: int, layer: Layer = layer) -> torch.Tensor:
        return AdaLoRA(AdaLoRAOptions(), seed).initialise(layer, torch.zeros(64, 100), 12, None, {}).A

    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))
    assert not torch.equal(start(0), start(0, Layer("model.layers.1.mlp.up_proj", 64, 100)))
    assert float(start(0).std()) == pytest.approx(0.02, rel=0.1)


def test_schedule() -> None:
    method = AdaLoRA(AdaLoRAOptions())
    method.set_steps(100)
    config = method.adapter_config({"layer": 12})
    assert (config.tinit, config.tfinal, config.total_step) == (10, 30, 100)
    with pytest.raises(UserError, match=r"^method\.tinit: 5 and method\.tfinal: 5 given; together less than the 10 "):
        AdaLoRA(AdaLoRAOptions(tinit=5, tfinal=5)).set_steps(10)


def test_options(base_config: dict[str, Any]) -> None:
    base_config["method"] = METHOD | {"target_r": 6}
    with pytest.raises(UserError, match=r"^method\.target_r: 6 given; allowed: less than method\.init_r \(6\)"):
        resolve(base_config)
    base_config["model"]["dtype"] = "float16"
    with pytest.raises(UserError, match=r"^model\.dtype: float16 given; adalora judges by gradients"):
        Training(base_config)


# -- with DeepSpeed --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def content(random_base: Path, data_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        "model": {"path": str(random_base), "dtype": "float32"},
        "data": {"train": {"path": str(data_files["train"]), "prompt": "q", "response": "a"}, "max_length": 64},
        "method": METHOD,
        "train": {
            "deepspeed": "ds_configs/zero2.json",
            "max_steps": 6,
            "batch_size": 12,
            "learning_rate": 1.0e-2,
            "save_steps": 3,
            "log_steps": 1,
        },
        "output_dir": str(tmp_path_factory.mktemp("adalora")),
    }


@pytest.fixture(scope="module")
def undisturbed(content: dict[str, Any]) -> Path:
    return alone(content, Path(content["output_dir"]), "undisturbed")


@pytest.mark.slow
def test_zero_3_trains_as_zero_2(content: dict[str, Any], undisturbed: Path, tmp_path: Path) -> None:
    train = {**content["train"], "deepspeed": "ds_configs/zero3.json"}
    other = alone(content, tmp_path, "zero3", train=train)
    assert largest_difference(trained(undisturbed, 6), trained(other, 6)) <= 1e-3
    left, right = ({k: v == 0 for k, v in trained(run, 6).items() if "lora_E" in k} for run in (undisturbed, other))
    assert equal(left, right)
    assert sum(int((~mask).sum()) for mask in left.values()) == 3 * LAYERS


@pytest.mark.slow
def test_resumed_is_equal_bit_for_bit(content: dict[str, Any], undisturbed: Path, tmp_path: Path) -> None:
    """Step 3 is checkpointed, and step 4 is the last allocation, by the averages of steps 1 to 3."""
    config = tmp_path / "killed.yaml"
    config.write_text(yaml.safe_dump({**content, "name": "killed", "output_dir": str(tmp_path)}))
    checkpoints = tmp_path / "killed" / "checkpoints"
    kill_after(config, 1, checkpoints / "step-3")
    for later in checkpoints.glob("*6*"):
        shutil.rmtree(later)
    state = load_file(checkpoints / "step-3" / "method.safetensors")
    assert {name.partition("/")[0] for name in state} == {"exp_avg_ipt", "exp_avg_unc", "kept"}
    run_gang(config, 1)
    assert equal(trained(undisturbed, 3), trained(tmp_path / "killed", 3))
    assert equal(trained(undisturbed, 6), trained(tmp_path / "killed", 6))
    assert not (checkpoints / "step-3" / "method.safetensors").exists()
