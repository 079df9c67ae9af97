"""The little of the OpenAI HTTP protocol that an evaluation needs: ``GET models`` and ``POST completions``.

A key is sent where ``$OPENAI_API_KEY`` is set. A server that is busy (429, 502, 503, 504) or drops a connection is
asked again, three times in all.
"""

import http.client
import json
import os
import socket
import time
import urllib.error
import urllib.request
from typing import Any

from harness.errors import UserError

ATTEMPTS = 3
_BUSY = (429, 502, 503, 504)


class Refused(Exception):
    """The server understood and said no: ``status`` and its own ``message`` on one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


class OpenAIClient:
    """Requests to one server.

    Args:
        url: address of the server, with or without ``/v1``.
        timeout: seconds that one answer may take.
        pause: seconds before the second attempt; each later one waits twice as long.
    """

    def __init__(self, url: str, *, timeout: float = 3600.0, pause: float = 1.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"eval.server: {url!r} given; give an address such as http://localhost:8000/v1")
        self.url = url.rstrip("/")
        if not self.url.endswith("/v1"):
            self.url += "/v1"
        self._timeout = timeout
        self._pause = pause

    def models(self) -> list[dict[str, Any]]:
        """What the server offers.

        Raises:
            UserError: nothing answers at the address, or something that is no OpenAI-compatible server.
        """
        try:
            listed = self._ask("models", None, timeout=min(self._timeout, 20.0))
        except Refused as refusal:
            if refusal.status in (401, 403):
                raise UserError(f"eval.server: {self.url} wants another key; set OPENAI_API_KEY") from refusal
            raise self._foreign(f"answered {refusal} to GET /v1/models") from refusal
        found = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(found, list) or not all(isinstance(entry, dict) and "id" in entry for entry in found):
            raise self._foreign("answered GET /v1/models with no list of models")
        return found

    def complete(self, **request: Any) -> list[dict[str, Any]]:
        """The choices of one completions request, one for each of its prompts, in their order.

        Raises:
            Refused: the server does not take this request.
            UserError: it cannot be reached any more, or its answer is not of the protocol.
        """
        answer = self._ask("completions", request)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or len(choices) != len(request["prompt"]):
            raise self._foreign("answered POST /v1/completions with another number of choices than prompts")
        return sorted(choices, key=lambda choice: choice.get("index", 0))

    def chat(self, **request: Any) -> str:
        """The text of one chat completion.

        Raises:
            Refused: the server does not take this request.
            UserError: it cannot be reached any more, or its answer is not of the protocol.
        """
        answer = self._ask("chat/completions", request)
        try:
            return answer["choices"][0]["message"]["content"] or ""
        except (TypeError, KeyError, IndexError) as error:
            raise self._foreign("answered POST /v1/chat/completions without a message") from error

    def post(self, path: str, **request: Any) -> None:
        """Send a request whose answer does not matter. Raises `Refused` and `UserError`."""
        self._ask(path, request, text=True)

    def _ask(self, path: str, body: Any, *, timeout: float | None = None, text: bool = False) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data=data, headers=headers)
        for attempt in range(1, ATTEMPTS + 1):
            last = attempt == ATTEMPTS
            try:
                with urllib.request.urlopen(request, timeout=timeout or self._timeout) as response:
                    content = response.read()
                return None if text else json.loads(content)
            except urllib.error.HTTPError as error:
                if last or error.code not in _BUSY:
                    raise Refused(error.code, _message(error)) from error
            except (urllib.error.URLError, http.client.IncompleteRead, ConnectionError, TimeoutError) as error:
                reason = getattr(error, "reason", error)
                # Nobody listens, or nobody of that name exists: asking again changes nothing.
                if last or isinstance(reason, ConnectionRefusedError | socket.gaierror | TimeoutError):
                    raise UserError(
                        f"eval.server: {self.url} cannot be reached ({reason}); start a server there, for example "
                        "`vllm serve MODEL --port 8000`, or correct the address"
                    ) from error
            except (http.client.HTTPException, json.JSONDecodeError, UnicodeDecodeError) as error:
                raise self._foreign("answered with something else than JSON over HTTP") from error
            time.sleep(self._pause * 2 ** (attempt - 1))
        raise AssertionError("unreachable")

    def _foreign(self, what: str) -> UserError:
        return UserError(
            f"eval.server: {self.url} is in use by something that is no OpenAI-compatible server: it {what}; correct "
            "the address, or start the server on a free port"
        )


def _message(error: urllib.error.HTTPError) -> str:
    """The server's own words, on one line of at most 300 characters."""
    raw = error.read().decode("utf-8", "replace")
    try:
        content = json.loads(raw)
    except json.JSONDecodeError:
        content = raw
    if isinstance(content, dict):
        inner = content.get("error", content)
        content = inner.get("message", inner) if isinstance(inner, dict) else inner
    return " ".join(str(content).split())[:300] or error.reason
