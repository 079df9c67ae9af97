"""The engine that asks a running server, against the reference engine; over real HTTP on this machine."""

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from harness.errors import UserError
from harness.evaluation.candidates import Candidate
from harness.evaluation.engines import evaluate
from harness.evaluation.openai_client import OpenAIClient
from harness.evaluation.scores import CandidateScores
from harness.evaluation.server_engine import ServerEngine
from harness.evaluation.text_model import Prompt
from tests.evaluation.conftest import LocalTasks
from tests.evaluation.server import Serving, serve


@pytest.fixture(scope="module")
def adapters(random_base: Path, make_adapter: Callable[..., Path]) -> tuple[Path, Path]:
    return make_adapter(random_base, seed=5, size=0.1), make_adapter(random_base, seed=6, size=0.1)


def found(candidates: list[Candidate], local_tasks: LocalTasks, tasks: tuple[str, ...], **options: Any) -> Any:
    return evaluate(
        candidates,
        tasks,
        dtype="float32",
        data_dir=local_tasks.data_dir,
        include_path=local_tasks.include_path,
        limit=12,
        cache=False,
        **options,
    )


def assert_alike(ours: list[CandidateScores], reference: list[CandidateScores]) -> None:
    for one, other in zip(ours, reference, strict=True):
        assert one.answers.get("words_next") == other.answers.get("words_next")
        for name, score in one.scores.items():
            assert score.items == other.scores[name].items == 12
            assert score.value == pytest.approx(other.scores[name].value, rel=1e-4)


@pytest.mark.parametrize("extended", [False, True], ids=["plain protocol", "vLLM's extensions"])
def test_scores_are_those_of_the_reference(
    random_base: Path, adapters: tuple[Path, Path], local_tasks: LocalTasks, extended: bool
) -> None:
    """Base, an adapter that the server found by its folder, one that it offers by name."""
    first, second = adapters
    serving = Serving(random_base, str(random_base), {"first": first, "second": second}, extended)
    with serve(serving):
        ours = found(
            [
                Candidate("base", None, random_base),
                Candidate("by folder", 1, random_base, first),
                Candidate("by name", 2, random_base, Path("second")),
            ],
            local_tasks,
            local_tasks.names,
            backend="server",
            server=serving.url,
            batch_size=5,
        )
    reference = found(
        [Candidate(str(a), None, random_base, a) for a in (None, first, second)],
        local_tasks,
        local_tasks.names,
        backend="hf",
    )
    assert_alike(ours, reference)
    assert len({str(one.answers) for one in ours}) == 3
    assert max(len(request["prompt"]) for request in serving.requests) == 5
    assert {request["model"] for request in serving.requests} == {str(random_base), "first", "second"}


def test_a_folder_is_loaded_where_the_server_allows_it(random_base: Path, adapters: tuple[Path, Path]) -> None:
    serving = Serving(random_base, str(random_base), extended=True, loads=True, failures=[503])
    with serve(serving):
        engine = ServerEngine(random_base, url=f"{serving.url}/v1")
        engine.use_adapter(adapters[0])
        prompt = Prompt(engine.tok_encode("abcd"), (), 6)
        adapted = engine.generate([prompt])
        engine.use_adapter(adapters[0])  # known by now: not loaded again
        assert engine.generate([prompt]) == adapted
        engine.use_adapter(None)
        assert engine.generate([prompt]) != adapted
        assert serving.adapters == {str(adapters[0].absolute()): adapters[0].absolute()}
        serving.loads = False
        with pytest.raises(UserError, match=r"does not load it \(404: Not Found\); start it with `--enable-lora"):
            engine.use_adapter(adapters[1])
        with pytest.raises(UserError, match=r"other is neither a folder here nor a name .* it offers /"):
            engine.use_adapter(Path("other"))


def test_what_a_server_cannot_do_is_one_line(random_base: Path, local_tasks: LocalTasks) -> None:
    serving = Serving(random_base, "org/another", echoes=False)
    base = [Candidate("base", None, random_base)]
    with serve(serving):
        with pytest.raises(UserError, match=r"does not offer .*; it offers org/another; serve it under that name"):
            found(base, local_tasks, ("words_next",), backend="server", server=serving.url)
        serving.name = f"org/{random_base.name}"
        assert found(base, local_tasks, ("words_next",), backend="server", server=serving.url)[0].scores
        with pytest.raises(UserError, match=r"no log-probabilities of prompts .* tasks that score texts need"):
            found(base, local_tasks, ("words_choice",), backend="server", server=serving.url)
        engine = ServerEngine(random_base, url=serving.url)
        serving.failures += [503, 429]  # busy: asked again
        engine._client._pause = 0.01
        assert engine.generate([Prompt([5], (), 2)])
        serving.failures += [503] * 3
        with pytest.raises(UserError, match="refuses a request: 503: try again"):
            engine.generate([Prompt([5], (), 2)])


class Dashboard(BaseHTTPRequestHandler):
    """Something else that listens on the port."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>dashboard</html>")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def dashboard() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@contextmanager
def other_protocol() -> Iterator[int]:
    """A port that something listens on which speaks no HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def greet() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b"220 mail ready\r\n")

        thread = threading.Thread(target=greet, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        thread.join()


def test_addresses_that_lead_nowhere(random_base: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    with pytest.raises(UserError, match=rf"eval\.server: http://127\.0\.0\.1:{free}/v1 cannot be reached \(.*refused"):
        ServerEngine(random_base, url=f"http://127.0.0.1:{free}")
    with pytest.raises(UserError, match=r"eval\.server: 'localhost:8000' given; give an address"):
        ServerEngine(random_base, url="localhost:8000")
    for listener in (dashboard, other_protocol):
        with (
            listener() as port,
            pytest.raises(UserError, match="in use by something that is no OpenAI") as error,
        ):
            ServerEngine(random_base, url=f"http://127.0.0.1:{port}")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"cannot be reached"):
        OpenAIClient("http://name.invalid").models()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("with_adapters", [False, True], ids=["base", "adapters"])
def test_a_real_vllm_server(
    tmp_path: Path, served_base: Path, make_adapter: Callable[..., Path], local_tasks: LocalTasks, with_adapters: bool
) -> None:
    """vLLM's own server in a process of its own. Where it serves adapters on the CPU it cannot score prompts."""
    pytest.importorskip("vllm")
    first, second = (make_adapter(served_base, seed=seed, size=0.1) for seed in (5, 6))
    if with_adapters:
        arguments = ["--enable-lora", "--max-lora-rank", "32", "--lora-modules", f"first={first}"]
        tasks: tuple[str, ...] = ("words_next",)
        candidates = [
            Candidate("base", None, served_base),
            Candidate("named", 1, served_base, Path("first")),
            Candidate("loaded", 2, served_base, second),
        ]
        reference = [Candidate(str(folder), None, served_base, folder) for folder in (None, first, second)]
    else:
        arguments, tasks = [], local_tasks.names
        candidates = reference = [Candidate("base", None, served_base)]
    with vllm_server(tmp_path / "log", served_base, arguments) as url:
        ours = found(candidates, local_tasks, tasks, backend="server", server=url)
    assert_alike(ours, found(reference, local_tasks, tasks, backend="hf"))
    assert len({str(one.answers) for one in ours}) == len(ours)


@contextmanager
def vllm_server(log: Path, model: Path, arguments: list[str]) -> Iterator[str]:
    """The address of vLLM's server for ``model`` on this machine, until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *arguments]
    command += ["--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        deadline = time.monotonic() + 400
        while not answers(f"http://127.0.0.1:{port}/v1/models"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=60)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True
