"""FCLoRA: tensors, penalty, clip and update against float64 from the paper; ablations; options; a resumed run."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from torch import nn

from harness.adapters.lora import BOUND, SIGMA, load_tensors, lora_layers, original_model, read_layers
from harness.adapters.orthogonality import gram_schmidt, orthogonality_errors
from harness.adapters.partitioned import clamp_trained
from harness.config import ModelConfig, resolve
from harness.decomposition.components import chosen_components, singular_value_quartile
from harness.errors import UserError
from harness.files import read_json
from harness.methods.base import LowRank
from harness.methods.fclora import FCLoRA, FCLoRAOptions, rounded_down
from harness.methods.registry import build_method
from harness.models.targets import Layer, target_modules
from harness.run_directory import RunDirectory
from harness.stages.export import export
from harness.stages.train import build_model
from harness.training.checkpoint import trained_parameters
from tests.conftest import run_gang
from tests.methods.formulas import SHAPES, weight_of
from tests.methods.runs import base_model, largest, live_model, logits, perturb, prompts, step_zero, write_checkpoint
from tests.training.test_runs import equal, kill_after, trained

METHOD: dict[str, Any] = {"name": "fclora", "rank": 6}
FORMS: dict[str, dict[str, Any]] = {
    "zero_gaussian": {},
    "singular": {"init": "singular", "quartile": 3},
    "bound": {"bound": 0.25},
    "lora_uv": {"variant": "lora_uv"},
    "lora_svd": {"variant": "lora_svd"},
    "gram_schmidt": {"init": "singular", "orthogonality": "gram_schmidt"},
}


def build(seed: int = 0, **options: Any) -> FCLoRA:
    return FCLoRA(FCLoRAOptions(**{"rank": 6, **options}), seed)


class Training:
    """A model with FCLoRA, trained on a fixed batch by AdamW, hooks called as the trainer calls them."""

    def __init__(self, config: dict[str, Any], rate: float = 0.3, **options: Any) -> None:
        self.config, self.run = step_zero(config, METHOD | options, "run")
        self.method = build_method(self.config.method, 0)
        self.model = build_model(self.config, self.run, self.method, None, needs_original=False)
        self.optimizer = torch.optim.AdamW(self.method.param_groups(self.model, rate, 0.0))

    def step(self) -> None:
        batch = prompts()
        output = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        penalty = self.method.penalty(self.model)
        (loss if penalty is None else loss + penalty).backward()
        self.optimizer.step()
        self.method.after_step(self.model)
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Every layer's tensors as a checkpoint and ``init/`` together have them."""
        trained = {name: p.detach() for name, p in trained_parameters(self.model)}
        initial = read_layers(self.run.init)
        return {layer: {n: trained.get(f"{layer}.{n}", t) for n, t in own.items()} for layer, own in initial.items()}


# -- decompositions --------------------------------------------------------------------------------


@pytest.mark.parametrize("quartile", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["outliers", "deficient", "half"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quartiles_are_numpys(shape: tuple[int, int], kind: str, quartile: int) -> None:
    W = weight_of(shape, kind)
    expected = np.percentile(np.linalg.svd(W.double().numpy(), compute_uv=False), 25 * quartile)
    assert singular_value_quartile(W, quartile) == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("kind", ["outliers", "deficient"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chosen_components(shape: tuple[int, int], kind: str) -> None:
    W, chosen = weight_of(shape, kind), [0, 3, 17, 38, 50, 63]
    found = chosen_components(W, chosen)
    U, sigma, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    assert (found.sigma - sigma[chosen]).abs().max() <= 1e-10 * sigma[0]
    for vectors in (found.U, found.V):
        assert (vectors.T @ vectors - torch.eye(6)).abs().max() <= 1e-12
    for i, index in enumerate(chosen):
        if sigma[index] > 1e-6:  # the others have no vectors of their own
            block = sigma[index] * torch.outer(U[:, index], Vh[index])
            assert (found.sigma[i] * torch.outer(found.U[:, i], found.V[:, i]) - block).norm() <= 1e-7 * sigma[index]


def test_gram_schmidt_is_the_loop() -> None:
    M = torch.randn(3, 40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.zeros_like(M)
    for matrix, columns in zip(M, expected, strict=True):
        for i in range(6):
            rest = matrix[:, i].clone()
            for j in range(i):
                rest -= (columns[:, j] @ rest) * columns[:, j]
            columns[:, i] = rest / rest.norm()
    assert torch.allclose(gram_schmidt(M), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bound_is_rounded_down(dtype: torch.dtype) -> None:
    for value in (0.1, 0.25, 1 / 3, 1.0, 60.007, 1e-3):
        rounded = rounded_down(value, dtype)
        assert 0.99 * value <= rounded <= value
        assert torch.tensor(rounded, dtype=torch.float64).to(dtype).double() == rounded
        step = torch.finfo(dtype).eps * value
        assert value - rounded < step  # nothing of the dtype lies between


# -- step 0 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tensors_of_step_0(shape: tuple[int, int]) -> None:
    W, layer = weight_of(shape, "outliers"), Layer("model.layers.1.mlp.up_proj", *shape)
    sigma = np.linalg.svd(W.double().numpy(), compute_uv=False)
    for quartile in (1, 4):
        start = build(quartile=quartile).initialise(layer, W, 6, None, {})
        expected = np.percentile(sigma, 25 * quartile)
        assert start.report["bound"] == pytest.approx(expected, rel=1e-10)
        assert expected * (1 - 1e-6) <= float(start.extra[BOUND]) <= expected
        assert torch.equal(start.extra[SIGMA], torch.full((6,), min(1.0, float(start.extra[BOUND]))))
        assert not start.B.any()
        assert float(start.A.std()) == pytest.approx(shape[1] ** -0.5, rel=0.15)
    start = build(init="singular", bound=0.7).initialise(layer, W, 6, None, {})
    assert not start.extra[SIGMA].any()
    chosen = start.report["components"]
    assert len(set(chosen)) == 6
    U, _, Vh = np.linalg.svd(W.double().numpy())
    for i, index in enumerate(chosen):
        pair = torch.outer(start.B[:, i].double(), start.A[i].double())
        assert (pair - torch.from_numpy(np.outer(U[:, index], Vh[index]))).abs().max() <= 1e-5
    assert build(init="singular", seed=1).initialise(layer, W, 6, None, {}).report["components"] != chosen
    svd = build(variant="lora_svd").initialise(layer, W, 6, None, {})
    assert set(svd.extra) == {SIGMA}
    assert bool((svd.extra[SIGMA] == 1).all())
    assert not build(variant="lora_uv").initialise(layer, W, 6, None, {}).extra


def test_a_bound_fits_the_models_dtype() -> None:
    layer, W = Layer("layer", 96, 96), weight_of((96, 96), "outliers")
    half = ModelConfig(path="x", dtype="bfloat16")
    bound = FCLoRA(FCLoRAOptions(), 0, half).initialise(layer, W, 4, None, {}).extra[BOUND]
    assert torch.equal(bound, bound.bfloat16().float())


def test_a_quartile_of_zero() -> None:
    W = weight_of((96, 96), "outliers")
    W[:60] = 0
    with pytest.raises(UserError, match=r"^method\.quartile: 1 given; it is 0 in layer layer, .* give method\.bound$"):
        build(quartile=1).initialise(Layer("layer", 96, 96), W, 6, None, {})


@pytest.mark.parametrize("form", FORMS)
def test_every_form(base_config: dict[str, Any], form: str) -> None:
    """Step 0 changes nothing; the trained model, its exports and the original model; what is frozen stays so."""
    config, run = step_zero(base_config, METHOD | FORMS[form], form)
    base = logits(base_model(config))
    model = live_model(config, run)
    assert torch.equal(logits(model), base)
    names = {name.split(".lora_")[1] for name, _ in trained_parameters(model)}
    assert names == {"A.weight", "B.weight"} | ({"sigma.weight"} if form != "lora_uv" else set())
    perturb(model, 0.15)
    moved = logits(model)
    assert largest(moved, base) > 0.1
    with original_model(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), moved)
    write_checkpoint(model, run)
    export(config, run)
    scale = float(moved.abs().max())
    plain = PeftModel.from_pretrained(base_model(config), str(run.adapter)).eval()
    assert largest(logits(plain), moved) <= 1e-4 * scale
    assert read_json(run.adapter / "adapter_config.json")["r"] == 6
    model.merge_adapter()
    assert largest(logits(model), moved) <= 1e-4 * scale
    model.unmerge_adapter()
    assert largest(logits(model), moved) <= 1e-4 * scale


def test_over_a_quantised_base(base_config: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes")
    base_config["model"]["quantization"] = "nf4"
    config, run = step_zero(base_config, METHOD, "nf4")
    model = live_model(config, run)
    start = logits(model)
    perturb(model, 0.3)
    assert largest(logits(model), start) > 0.1
    with original_model(model):
        assert torch.equal(logits(model), start)


# -- training --------------------------------------------------------------------------------------


def test_update_against_float64() -> None:
    generator = torch.Generator().manual_seed(2)
    U, Vt = torch.randn(20, 6, generator=generator), torch.randn(6, 30, generator=generator)
    sigma = torch.rand(6, generator=generator)
    update = build().update({"lora_A.weight": Vt, "lora_B.weight": U, SIGMA: sigma, BOUND: torch.ones(1)}, None)
    assert isinstance(update, LowRank)
    expected = sum(sigma[i].double() * torch.outer(U[:, i].double(), Vt[i].double()) for i in range(6))
    assert (update.dense().double() - expected).norm() <= 1e-6 * expected.norm()


def test_penalty_against_a_loop(base_config: dict[str, Any]) -> None:
    training = Training(base_config, gamma=0.3)
    perturb(training.model, 0.1)
    found = training.method.penalty(training.model)
    found.backward()
    expected, copies = torch.zeros((), dtype=torch.float64), {}
    for name, parameter in trained_parameters(training.model):
        if name.endswith(SIGMA):
            assert parameter.grad is None
            continue
        M = parameter.detach().double().requires_grad_()
        gram = M @ M.T if name.endswith("lora_A.weight") else M.T @ M
        expected = expected + 0.3 * ((gram - torch.eye(6, dtype=torch.float64)) ** 2).sum().sqrt()
        copies[name] = (parameter, M)
    expected.backward()
    assert len(copies) == 28
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for parameter, M in copies.values():
        assert torch.allclose(parameter.grad.double(), M.grad, atol=1e-7)


def test_penalty_of_orthonormal_and_of_zero_factors() -> None:
    U = nn.Parameter(torch.eye(8)[:, :3].contiguous())
    zero = nn.Parameter(torch.zeros(3, 8))
    errors = orthogonality_errors([U], [zero])
    assert torch.equal(errors.detach(), torch.tensor([0.0, 3.0**0.5]))
    errors.sum().backward()
    assert not U.grad.any()
    assert not zero.grad.any()
    assert build(gamma=0.0).penalty(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("form", ["zero_gaussian", "singular", "gram_schmidt"])
def test_singular_values_stay_within_bounds(base_config: dict[str, Any], form: str) -> None:
    """With steps so large that σ meets both ends in every layer; the spectral norm of ΔW is bounded with it."""
    training = Training(base_config, **FORMS[form], **({} if form == "gram_schmidt" else {"gamma": 0.5}))
    low, high = 0, 0
    for _ in range(6):
        training.step()
        for own in training.tensors().values():
            sigma, bound = own[SIGMA], float(own[BOUND])
            assert 0 <= float(sigma.min()) <= float(sigma.max()) <= bound
            low, high = low + int((sigma == 0).sum()), high + int((sigma == bound).sum())
            U, Vt = own["lora_B.weight"].double(), own["lora_A.weight"].double()
            error = max(torch.linalg.matrix_norm(M - torch.eye(6), 2) for M in (U.T @ U, Vt @ Vt.T))
            if form == "gram_schmidt":
                assert error <= 1e-5
            norm = torch.linalg.matrix_norm(U * sigma.double() @ Vt, 2)
            assert norm <= bound * (1 + error) * (1 + 1e-9)
    assert high > 0
    assert low > 0


def test_without_the_clip_it_would_leave_them(base_config: dict[str, Any]) -> None:
    """The ablation trains σ freely: what the clip holds back is there."""
    training = Training(base_config, variant="lora_svd")
    for _ in range(6):
        training.step()
    values = torch.cat([own[SIGMA] for own in training.tensors().values()])
    assert float(values.max()) > 1.2
    assert float(values.min()) < 0


def test_clamp_without_deepspeed() -> None:
    parameters = [nn.Parameter(torch.tensor([-1.0, 0.5, 9.0])), nn.Parameter(torch.tensor([-2.0, 3.0]).bfloat16())]
    clamp_trained(parameters, 0.0, [2.0, 1.0])
    assert parameters[0].tolist() == [0.0, 0.5, 2.0]
    assert parameters[1].tolist() == [0.0, 1.0]


def test_names_under_which_it_is_saved(base_config: dict[str, Any]) -> None:
    config, run = step_zero(base_config, METHOD, "names")
    layers = read_layers(run.init)
    assert {frozenset(own) for own in layers.values()} == {
        frozenset(("lora_A.weight", "lora_B.weight", SIGMA, BOUND)),
    }
    model = live_model(config, run)
    name, layer = next(iter(lora_layers(model).items()))
    load_tensors(model, [(f"{name}.{SIGMA}", torch.arange(6.0))])
    assert torch.equal(layer.lora_sigma["default"].weight, torch.arange(6.0))
    assert torch.equal(layer.lora_bound["default"], layers[name][BOUND])
    assert set(layers) == set(target_modules(base_model(config), "all-linear"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -0.1}, r"method\.gamma: -0\.1 given; "),
        ({"bound": -1.0}, r"method\.bound: -1\.0 given; "),
        ({"bound": 0.0}, r"method\.bound: 0\.0 given; "),
        ({"quartile": 5}, r"method\.quartile: 5 given; "),
        (
            {"quartile": 2, "bound": 1.0},
            r"method\.bound: 1\.0 given; allowed: either method\.quartile or method\.bound",
        ),
        ({"variant": "lora_svd", "bound": 1.0}, r"method\.bound: 1\.0 given; allowed: no bound with method\.variant"),
        ({"variant": "lora_uv", "init": "singular"}, r"method\.init: .*singular.* given; allowed: zero_gaussian with"),
        ({"orthogonality": "gram_schmidt"}, r"method\.orthogonality: .*allowed: penalty, or method\.init: singular"),
        (
            {"init": "singular", "orthogonality": "gram_schmidt", "gamma": 0.1},
            r"method\.gamma: 0\.1 given; allowed: no gamma with method\.orthogonality",
        ),
        ({"alpha": 3.0}, r"method\.alpha"),
    ],
)
def test_bad_options(base_config: dict[str, Any], options: dict[str, Any], message: str) -> None:
    base_config["method"] = METHOD | options
    with pytest.raises(UserError, match=message) as error:
        resolve(base_config)
    assert "\n" not in str(error.value)


# -- with DeepSpeed --------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_resumed(base_config: dict[str, Any], tmp_path: Path) -> None:
    """σ̄ is read from ``init/`` again; bit for bit the run that was not killed, under the anchor."""
    base_config |= {"method": METHOD | {"init": "singular"}, "anchor": {"kl": 1.0, "prompts_per_step": 2}}
    base_config["train"] |= {"max_steps": 4, "save_steps": 2, "log_steps": 1, "learning_rate": 0.1}
    paths = {}
    for name in ("undisturbed", "killed"):
        paths[name] = tmp_path / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump({**base_config, "output_dir": str(tmp_path / name)}))
    undisturbed, killed = (tmp_path / name / "run" for name in paths)
    run_gang(paths["undisturbed"], 1)
    kill_after(paths["killed"], 1, killed / "checkpoints" / "step-2")
    for later in (killed / "checkpoints").glob("*4*"):
        shutil.rmtree(later)
    run_gang(paths["killed"], 1)
    assert equal(trained(undisturbed, 2), trained(killed, 2))
    assert equal(trained(undisturbed, 4), trained(killed, 4))
    assert not equal(trained(killed, 2), trained(killed, 4))
    limits = {name: float(own[BOUND]) for name, own in read_layers(RunDirectory(killed).init).items()}
    values = {n.removesuffix(f".{SIGMA}"): v for n, v in trained(killed, 4).items() if n.endswith(SIGMA)}
    assert values.keys() == limits.keys()
    assert any(float(values[name].max()) == limits[name] for name in limits)
    assert all(0 <= float(values[name].min()) <= float(values[name].max()) <= limits[name] for name in limits)
