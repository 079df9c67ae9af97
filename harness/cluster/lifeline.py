"""A connection between the driver and each of its workers, by which either notices that the other is gone.

Ray ends the actors of a driver that died, but a worker that is cut off from Ray's head hears of that a minute later,
and would go on writing into the run directory beside the next attempt. The system closes the connections of a process
that ends, however it ends; keep-alive probes find a node that has gone silent, within about a minute.
"""

import os
import secrets
import socket
import threading
import time

TOKEN_BYTES = 16
_HEADER_BYTES = 2 * TOKEN_BYTES + 8  # token in hexadecimal, then the worker's number
_PROBES = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}


class Lifeline:
    """The driver's end: listens for workers that know the token, and knows which of them are gone."""

    def __init__(self, host: str) -> None:
        """``host``: the address under which workers reach this process."""
        self._token = secrets.token_hex(TOKEN_BYTES)
        self._server = socket.create_server(("", 0))
        self.address = (host, self._server.getsockname()[1], self._token)
        self._connections: dict[int, socket.socket] = {}
        self._gone: set[int] = set()
        self._changed = threading.Condition()
        threading.Thread(target=self._accept, daemon=True, name="lifeline").start()

    def gone(self) -> set[int]:
        """Numbers of the workers that were connected and are no more."""
        with self._changed:
            return set(self._gone)

    def wait_until_gone(self, seconds: float) -> set[int]:
        """Wait until every worker that ever connected is gone; those that are not after ``seconds``."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while (left := self._connections.keys() - self._gone) and (rest := deadline - time.monotonic()) > 0:
                self._changed.wait(rest)
            return set(left)

    def close(self) -> None:
        """Let go of all workers: those that are still there end."""
        self._server.close()
        with self._changed:
            for connection in self._connections.values():
                _shut(connection)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True, name="lifeline of a worker").start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(10)
        header = _read(connection, _HEADER_BYTES)
        if not secrets.compare_digest(header[: 2 * TOKEN_BYTES], self._token.encode()):
            connection.close()
            return
        number = int(header[2 * TOKEN_BYTES :])
        _keep_alive(connection)
        with self._changed:
            self._connections[number] = connection
        _read(connection, 1)  # nothing is ever sent: this returns when the connection ends
        with self._changed:
            self._gone.add(number)
            self._changed.notify_all()
        connection.close()


def hold(address: tuple[str, int, str], number: int) -> None:
    """The worker's end: end this process, at once, when the driver at ``address`` is gone.

    Raises:
        OSError: the driver cannot be reached.
    """
    host, port, token = address
    connection = socket.create_connection((host, port), timeout=30)
    connection.sendall(f"{token}{number:08d}".encode())
    _keep_alive(connection)

    def watch() -> None:
        _read(connection, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="lifeline").start()


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _read(connection: socket.socket, count: int) -> bytes:
    """``count`` bytes, fewer where the connection ends before."""
    received = b""
    while len(received) < count:
        try:
            part = connection.recv(count - len(received))
        except OSError:
            break
        if not part:
            break
        received += part
    return received


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # it has ended already
        return
