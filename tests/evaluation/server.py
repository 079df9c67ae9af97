"""A small OpenAI-compatible server over our reference engine: models, completions with echo and log-probabilities.

It speaks the protocol's plain form (text and ``echo``), or vLLM's extended one (token ids and ranks) besides.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from harness.evaluation.hf_engine import HFEngine
from harness.evaluation.text_model import Prompt

KNOWN = {"model", "prompt", "max_tokens", "temperature", "stop", "echo", "logprobs", "seed", "top_p"}
KNOWN |= {"frequency_penalty", "presence_penalty"}


@dataclass
class Serving:
    """What a server holds and how it behaves; ``failures``: statuses to answer with before it behaves."""

    base: Path
    name: str
    adapters: dict[str, Path] = field(default_factory=dict)
    extended: bool = False
    echoes: bool = True
    loads: bool = False
    failures: list[int] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve(serving: Serving) -> Iterator[Serving]:
    """The server on a free port of this machine, until the block ends."""
    engine, lock = HFEngine(serving.base, dtype="float32", batch_size=16), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            base = {"id": serving.name, "object": "model"}
            adapters = [
                {"id": name, "object": "model", "root": str(path), "parent": serving.name}
                for name, path in serving.adapters.items()
            ]
            self._answer(200, {"object": "list", "data": [base, *adapters]})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            serving.requests.append(request)
            if serving.failures:
                self._refuse(serving.failures.pop(0), "try again")
            elif self.path == "/v1/load_lora_adapter":
                if not serving.loads:
                    self._refuse(404, "Not Found")
                else:
                    serving.adapters[request["lora_name"]] = Path(request["lora_path"])
                    self._answer(200, "Success")
            elif self.path != "/v1/completions":
                self._refuse(404, "Not Found")
            elif not serving.extended and (unknown := set(request) - KNOWN):
                self._refuse(400, f"Unrecognized request argument supplied: {min(unknown)}")
            elif not serving.extended and len(request.get("stop", [])) > 4:
                self._refuse(400, "at most 4 stop strings")
            else:
                with lock:
                    engine.use_adapter(serving.adapters.get(request["model"]))
                    self._answer(200, {"choices": completions(engine, serving, request)})

        def _refuse(self, status: int, message: str) -> None:
            self._answer(status, {"error": {"message": message}})

        def _answer(self, status: int, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    serving.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield serving
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        engine.close()


def completions(engine: HFEngine, serving: Serving, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of one request; index 0 comes last, since the protocol promises no order."""
    stop = tuple(request.get("stop", ()))
    rows: list[list[int]] = request["prompt"]
    answers = engine.generate([Prompt(row, stop, request["max_tokens"]) for row in rows])
    choices = []
    for index, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        text = engine.tokenizer.decode(answer, skip_special_tokens=True)
        for string in stop:
            text = text.split(string)[0]
        choice: dict[str, Any] = {"index": index, "text": text, "logprobs": None}
        if serving.extended and request.get("return_token_ids"):
            choice["token_ids"] = answer
        with torch.inference_mode():
            logits = engine._model(torch.tensor([row])).logits[0].double().log_softmax(-1)
        values = [None, *(float(logits[i - 1, row[i]]) for i in range(1, len(row)))]
        best = [None, *(float(logits[i - 1].max()) for i in range(1, len(row)))]
        if serving.extended and "prompt_logprobs" in request:
            choice["prompt_logprobs"] = [
                None if value is None else {str(token): {"logprob": value, "rank": 1 if value == top else 2}}
                for token, value, top in zip(row, values, best, strict=True)
            ]
        if serving.echoes and request.get("echo"):
            choice["logprobs"] = {
                "token_logprobs": [*values, -1.0],
                "top_logprobs": [None, *({"best": value} for value in best[1:]), {"next": -1.0}],
            }
        choices.append(choice)
    return choices[::-1]
