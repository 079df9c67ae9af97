"""Several engines that answer as one: each in a process of its own, on GPUs of its own.

Requests are dealt out by length, longest first, so that every engine has about the same to do; answers come back in
the order of the requests. Greedy answers and log-probabilities are those of one engine. So are vLLM's sampled answers,
which have a generator each; ``hf`` draws for a batch at a time, and batches are others here.

Engines are separate processes because vLLM in one process holds one engine. They talk over pipes: no port is opened.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch

from harness.errors import UserError
from harness.evaluation.text_model import Prompt, Scored, TextModel

Request = TypeVar("Request", Prompt, Scored)


class EngineGroup(TextModel):
    """``engines`` engines over the same base model.

    Args:
        model: model folder or hub id.
        build: makes an engine in its process; must be picklable (a function of a module, a ``functools.partial``).
        engines: how many.
        gpus: GPUs for each of them; ignored where there are none.

    Raises:
        UserError: there are too few GPUs, or an engine could not be built.
    """

    def __init__(self, model: str | Path, *, build: Callable[[], TextModel], engines: int, gpus: int = 1) -> None:
        places = gpu_places(engines, gpus)
        super().__init__(model)
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        context = multiprocessing.get_context("spawn")
        try:
            for place in places:
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, build), daemon=False)
                with _environment(place):
                    process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
            self._receive(range(engines))
        except BaseException:
            self.close()
            raise

    def use_adapter(self, adapter: Path | None) -> None:
        self._all("use_adapter", adapter)

    def generate(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        return self._split("generate", prompts)

    def score(self, requests: Sequence[Scored]) -> list[tuple[float, bool]]:
        return self._split("score", requests)

    def close(self) -> None:
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:  # its process has ended
                continue
        for process in self._processes:
            process.join(timeout=60)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []

    def _split(self, method: str, requests: Sequence[Request]) -> list[Any]:
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].tokens))
        parts = [order[number :: len(self._pipes)] for number in range(len(self._pipes))]
        busy = [number for number, part in enumerate(parts) if part]
        for number in busy:
            self._send(number, method, [requests[i] for i in parts[number]])
        answers: list[Any] = [None] * len(requests)
        for number, found in self._receive(busy).items():
            for i, answer in zip(parts[number], found, strict=True):
                answers[i] = answer
        return answers

    def _all(self, method: str, *arguments: Any) -> None:
        for number in range(len(self._pipes)):
            self._send(number, method, *arguments)
        self._receive(range(len(self._pipes)))

    def _send(self, number: int, method: str, *arguments: Any) -> None:
        try:
            self._pipes[number].send((method, arguments))
        except OSError as error:
            raise RuntimeError(self._ended(number)) from error

    def _receive(self, numbers: Sequence[int]) -> dict[int, Any]:
        """One answer of each engine, as they come: an engine that fails is heard while others still work."""
        waiting = {self._pipes[number]: number for number in numbers}
        answers = {}
        while waiting:
            for pipe in wait(list(waiting)):
                number = waiting.pop(pipe)  # type: ignore[arg-type]
                try:
                    kind, content = pipe.recv()  # type: ignore[union-attr]
                except EOFError as error:
                    raise RuntimeError(self._ended(number)) from error
                if kind == "user error":
                    raise UserError(content)
                if kind == "error":
                    raise RuntimeError(f"engine {number} failed:\n{content}")
                answers[number] = content
        return answers

    def _ended(self, number: int) -> str:
        process = self._processes[number]
        process.join(timeout=5)
        return f"engine {number} (process {process.pid}) ended with exit code {process.exitcode}"


def gpu_places(engines: int, gpus: int) -> list[str | None]:
    """``CUDA_VISIBLE_DEVICES`` of each engine, ``gpus`` each; None for each where there are no GPUs.

    Raises:
        UserError: this machine has fewer GPUs than that.
    """
    count = torch.cuda.device_count()
    if not count:
        return [None] * engines
    if engines * gpus > count:
        raise UserError(
            f"eval.engines: {engines} × eval.tensor_parallel: {gpus} given; that needs {engines * gpus} GPUs, and "
            f"there are {count}"
        )
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",")[:count] if named else [str(number) for number in range(count)]
    return [",".join(devices[number * gpus : (number + 1) * gpus]) for number in range(engines)]


@contextmanager
def _environment(devices: str | None) -> Iterator[None]:
    """What a process that is started inside inherits: its GPUs, or no cores of its own.

    Without GPUs each of vLLM's engines would bind itself to the same cores.
    """
    values = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Connection, build: Callable[[], TextModel]) -> None:
    """The engine's process: build it, then answer until the other end says so or is gone."""
    from harness.evaluation.verbosity import quiet_libraries

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C reaches the parent, which closes this one
    with quiet_libraries():
        engine: TextModel | None = None
        try:
            engine = build()
            pipe.send(("done", None))
            while (asked := pipe.recv()) is not None:
                method, arguments = asked
                pipe.send(("done", getattr(engine, method)(*arguments)))
        except EOFError:
            pass  # the parent has ended
        except UserError as error:
            pipe.send(("user error", str(error)))
        except Exception:
            pipe.send(("error", traceback.format_exc()))
        finally:
            if engine is not None:
                engine.close()
            pipe.close()
