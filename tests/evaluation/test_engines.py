"""Which engine answers and how: adapters of other bases, ranks that vLLM does not serve, several engines, options."""

import functools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from harness.errors import UserError
from harness.evaluation.adapter_check import BaseLayers
from harness.evaluation.candidates import Candidate, servable
from harness.evaluation.engine_group import EngineGroup, gpu_places
from harness.evaluation.engines import check_backend, evaluate, open_engine
from harness.evaluation.hf_engine import HFEngine
from harness.evaluation.merging import merged, updates
from harness.evaluation.text_model import Prompt, Scored
from tests.evaluation.conftest import LocalTasks
from tests.gangs import REPOSITORY


@pytest.fixture(scope="module")
def adapter(random_base: Path, make_adapter: Callable[..., Path]) -> Path:
    return make_adapter(random_base, seed=1, size=0.1)


# Adapters of another base.


def changed(adapter: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> Path:
    """A copy of ``adapter`` with other tensors or configuration."""
    folder.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    content = json.loads((adapter / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def wider(tensors: dict[str, torch.Tensor]) -> None:
    for key in tensors:
        if "down_proj.lora_A" in key:
            tensors[key] = torch.zeros(tensors[key].shape[0], 192)


def deeper(tensors: dict[str, torch.Tensor]) -> None:
    for key in list(tensors):
        if ".layers.1." in key:
            tensors[key.replace(".layers.1.", ".layers.7.")] = tensors.pop(key)


def halved(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(key for key in tensors if "q_proj.lora_B" in key)]


def uneven(tensors: dict[str, torch.Tensor]) -> None:
    for key in tensors:
        if "layers.0.self_attn.v_proj.lora_A" in key:
            tensors[key] = torch.cat([tensors[key]] * 2)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (wider, r"down_proj is 64 × 192 in the adapter and 64 × 160 in the base \(2 of 14 layers do not fit\)"),
        (deeper, r"there is no layer model\.layers\.7\.\S+ in the base \(7 of 14 layers do not fit\)"),
        (halved, r"q_proj has only one of its two factors \(1 of 14"),
        (uneven, r"v_proj has factors of ranks 16 and 8"),
        (dict.clear, None),
    ],
)
def test_an_adapter_of_another_base_is_refused(
    tmp_path: Path, random_base: Path, adapter: Path, change: Callable[..., None], line: str | None
) -> None:
    other = changed(adapter, tmp_path / "other", change, base_model_name_or_path="org/another")
    if line is None:
        return BaseLayers(random_base).check(other)
    with pytest.raises(UserError, match=line) as error:
        BaseLayers(random_base).check(other)
    assert str(error.value).startswith(f"eval: the adapter {other} is not for {random_base}: ")
    assert str(error.value).endswith("evaluate it on the model it was trained on, org/another")
    assert "\n" not in str(error.value)


def test_an_adapter_that_fits(
    random_base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = BaseLayers(random_base)
    layers.check(adapter)
    assert "warning" not in "".join(capsys.readouterr())
    layers.check(changed(adapter, tmp_path / "named", lambda _: None, base_model_name_or_path="org/another"))
    assert "was trained on org/another; it is evaluated on" in "".join(capsys.readouterr())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors"):
        layers.check(tmp_path / "empty")


def test_layers_that_lie_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2's Conv1D stores weights (in, out); embeddings have factors of their own."""
    base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=40, n_positions=8))
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(
        r=2, lora_alpha=8, target_modules=["c_attn", "wte"], fan_in_fan_out=True, init_lora_weights=False
    )
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    BaseLayers(tmp_path / "base").check(tmp_path / "adapter")
    (found,) = updates(tmp_path / "adapter").values()
    assert tuple(found.dense().shape) == (16, 48)


def test_no_engine_is_started_for_it(
    tmp_path: Path, random_base: Path, adapter: Path, local_tasks: LocalTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where the base, which comes first, could be evaluated; and only where there is something to ask."""

    def none_may_start(*_: object, **__: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr("harness.evaluation.engines.open_engine", none_may_start)
    other = changed(adapter, tmp_path / "other", wider)
    candidates = [Candidate("base", None, random_base), Candidate("other", 1, random_base, other)]
    for backend in ("hf", "vllm"):
        with pytest.raises(UserError, match="is not for"):
            evaluate(candidates, ["words_next"], backend=backend, dtype="float32", **places(local_tasks))


def places(local_tasks: LocalTasks) -> dict[str, Path]:
    return {"data_dir": local_tasks.data_dir, "include_path": local_tasks.include_path}


# Ranks above vLLM's limit.


@pytest.mark.parametrize("rslora", [False, True])
def test_updates_are_what_peft_adds(tmp_path: Path, random_base: Path, rslora: bool) -> None:
    """Weights merged by us against those that PEFT merges; ranks and α that differ by layer, some names being regular
    expressions; a rank that is larger than the layer."""
    torch.manual_seed(3)
    config = LoraConfig(
        r=5,
        lora_alpha=7,
        target_modules="all-linear",
        rank_pattern={"q_proj": 3, r"model\.layers\.1\..*\.up_proj": 600},
        alpha_pattern={"q_proj": 9, "layers.0.self_attn.o_proj": 2},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    base = AutoModelForCausalLM.from_pretrained(random_base, dtype=torch.float32)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    reference = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(random_base, dtype=torch.float32), tmp_path / "adapter"
    ).merge_and_unload()
    with merged(random_base, tmp_path / "adapter", "float32") as folder:
        ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert (folder / "tokenizer.json").is_file()
    assert not folder.exists()
    for (name, weight), (_, other) in zip(ours.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-5, msg=name)
    weight = reference.get_submodule("model.layers.1.mlp.up_proj").weight
    assert not torch.allclose(
        weight, AutoModelForCausalLM.from_pretrained(random_base).model.layers[1].mlp.up_proj.weight
    )


def test_what_killed_evaluations_left_is_removed(
    tmp_path: Path, random_base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    left, used = (tmp_path / "eval" / f"merged-{socket.gethostname()}-{pid}-x" for pid in (ended.pid, os.getpid()))
    left.mkdir(parents=True)
    used.mkdir()
    with merged(random_base, adapter, "float32"):
        assert not left.exists()
        assert used.exists()


def test_a_rank_above_the_limit_is_merged(
    tmp_path: Path, random_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vllm")
    config = {"peft_type": "LORA", "r": 8, "rank_pattern": {"q_proj": 600}, "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = servable(Candidate("final", 1, random_base, tmp_path), "vllm")
    assert found == Candidate("final", 1, random_base, tmp_path, merge=True)
    assert "final is merged for the evaluation: its rank is 600, the largest that vLLM serves is 512" in "".join(
        capsys.readouterr()
    )
    assert not servable(Candidate("final", 1, random_base, tmp_path), "hf").merge


# Several engines.


@pytest.mark.slow
def test_two_engines_answer_as_one(random_base: Path, adapter: Path, local_tasks: LocalTasks) -> None:
    """Every kind of task, a base and an adapter; real processes."""
    candidates = [Candidate("base", None, random_base), Candidate("adapter", 1, random_base, adapter)]
    one, two = (
        evaluate(
            candidates,
            local_tasks.names,
            backend="hf",
            dtype="float32",
            engines=engines,
            batch_size=5,
            cache=False,
            **places(local_tasks),
        )
        for engines in (1, 2)
    )
    for single, split in zip(one, two, strict=True):
        assert single.answers["words_next"] == split.answers["words_next"]
        for name, score in single.scores.items():
            assert split.scores[name].value == pytest.approx(score.value, rel=1e-6)
    assert one[0].answers != one[1].answers


def broken() -> HFEngine:
    raise UserError("model.path: no such model")


class Fragile(HFEngine):
    """Ends its process at the prompt [7]."""

    def generate(self, prompts: Any) -> Any:
        if any(prompt.tokens == [7] for prompt in prompts):
            sys.exit(3)
        if any(prompt.tokens == [8] for prompt in prompts):
            raise ValueError("a defect")
        return super().generate(prompts)


@pytest.mark.slow
def test_an_engine_that_fails_is_heard(random_base: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path: no such model"):
        EngineGroup(random_base, build=broken, engines=2)
    build = functools.partial(Fragile, random_base, dtype="float32", batch_size=4)
    group = EngineGroup(random_base, build=build, engines=2)
    processes = list(group._processes)
    try:
        # Fewer requests than engines, and none at all.
        assert group.generate([]) == group.score([]) == []
        assert len(group.generate([Prompt([5, 6], (), 3)])[0]) > 0
        assert group.score([Scored([5, 6], 1)])[0][0] < 0
        with pytest.raises(RuntimeError, match=r"ended with exit code 3"):
            group.generate([Prompt([5, 6], (), 2), Prompt([7], (), 2)])
    finally:
        group.close()
    assert not any(process.is_alive() for process in processes)
    group = EngineGroup(random_base, build=build, engines=1)
    with pytest.raises(RuntimeError, match=r"(?s)engine 0 failed:.*ValueError: a defect"):
        group.generate([Prompt([8], (), 2)])
    group.close()


def test_gpus_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.cuda.device_count() or gpu_places(2, 1) == [None, None]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_places(2, 2) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    assert gpu_places(3, 1) == ["7", "5", "3"]
    with pytest.raises(UserError, match=r"4 × eval\.tensor_parallel: 2 given; that needs 8 GPUs, and there are 4"):
        gpu_places(4, 2)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"backend": "sglang"}, r"eval\.backend: 'sglang' given; allowed: vllm, hf, server"),
        ({"backend": "server"}, r"eval\.server: nothing given"),
        ({"backend": "hf", "server": "http://localhost:8000"}, r"set eval\.backend to server"),
        ({"backend": "hf", "tensor_parallel": 2}, r"eval\.tensor_parallel: 2 given; with eval\.backend hf allowed: 1"),
        ({"backend": "vllm", "engines": 0}, r"eval\.engines: 0 given; allowed: 1 or more"),
        ({"backend": "server", "server": "http://x", "engines": 2}, r"eval\.engines: 2 given; .* allowed: 1"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        check_backend(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without GPUs")
def test_tensor_parallelism_needs_gpus(random_base: Path) -> None:
    with (
        pytest.raises(UserError, match=r"eval\.tensor_parallel: 2 given; there are 0 GPUs here"),
        open_engine(str(random_base), "vllm", "float32", 1, 0, 0, None, tensor_parallel=2),
    ):
        pass


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_vllm_with_two_engines_and_a_rank_that_it_does_not_serve(
    tmp_path: Path, served_base: Path, make_adapter: Callable[..., Path], local_tasks: LocalTasks
) -> None:
    pytest.importorskip("vllm")
    torch.manual_seed(4)
    config = LoraConfig(r=600, lora_alpha=60, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    base = AutoModelForCausalLM.from_pretrained(served_base, dtype=torch.float32)
    get_peft_model(base, config).save_pretrained(tmp_path / "large")
    candidates = [
        Candidate("base", None, served_base),
        Candidate("adapter", 1, served_base, make_adapter(served_base, seed=1, size=0.1)),
        Candidate("large", 2, served_base, tmp_path / "large"),
    ]
    hf, one, two = (
        evaluate(
            candidates[: 2 if engines == 2 else 3],  # a model that is merged is nothing else to two engines
            local_tasks.names,
            backend=backend,
            engines=engines,
            dtype="float32",
            cache=False,
            **places(local_tasks),
        )
        for backend, engines in (("hf", 1), ("vllm", 1), ("vllm", 2))
    )
    for reference, single in zip(hf, one, strict=True):
        pairs = zip(single.answers["words_next"], reference.answers["words_next"], strict=True)
        assert sum(ours == theirs for ours, theirs in pairs) >= 23
        for name, score in reference.scores.items():
            assert single.scores[name].value == pytest.approx(score.value, rel=1e-3, abs=1 / 24 + 1e-9)
    for single, split in zip(one, two, strict=False):
        assert single.answers["words_next"] == split.answers["words_next"]
        for name, score in single.scores.items():
            assert split.scores[name].value == pytest.approx(score.value, rel=1e-4)
    assert len({found.scores["words_perplexity"].value for found in one}) == 3


@pytest.mark.slow
def test_the_command_line(tmp_path: Path, random_base: Path, adapter: Path, local_tasks: LocalTasks) -> None:
    command = [sys.executable, str(REPOSITORY / "eval" / "run.py"), "--model", str(random_base)]
    command += ["--adapter", str(adapter), "--tasks", "words_next,words_choice", "--dtype", "float32"]
    command += ["--data-dir", str(local_tasks.data_dir), "--include-path", str(local_tasks.include_path)]

    def call(*more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([*command, *more], capture_output=True, text=True, check=False)

    done = call("--backend", "hf", "--out", str(tmp_path / "scores.json"))
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert json.loads(done.stdout) == scores
    assert [one["name"] for one in scores] == ["model", str(adapter)]
    again = call("--backend", "hf")
    assert json.loads(again.stdout) == scores  # seconds too: they are those of the first time
    assert again.stderr.count("known from an earlier evaluation") == 2
    refused = call("--backend", "server", "--server", "http://127.0.0.1:9")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: eval.server: http://127.0.0.1:9/v1 cannot be reached (")
    assert refused.stderr.count("\n") == 1
