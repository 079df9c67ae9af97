"""Joining a Ray cluster, or saying in one line why that cannot be."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from harness.console import say
from harness.errors import UserError

REACH_SECONDS = 10.0
CLIENT_CRASH = "Initialization failure from server"
OBJECT_STORE_BYTES = 100 * 2**20  # of a cluster of this machine: what is large goes through files
_ALLOWED = "allowed: local, auto, host:port of the head, ray://host:port from outside the cluster"


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Be a driver of the cluster at ``address`` inside the block.

    Args:
        address: ``local`` starts a cluster in this process's care, ``auto`` finds the one that this machine belongs to
            (``$RAY_ADDRESS`` first), ``host:port`` is the head's, ``ray://host:port`` is that of Ray Client.

    Raises:
        UserError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("cluster: ray is not installed; pip install 'ray[default]'") from error

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports to the makers of Ray from here
    place = os.environ.get("RAY_ADDRESS") or address if address == "auto" else address
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": True}
    if place == "local":
        options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    elif place != "auto":
        check_reachable(place)
    try:
        _join(place, options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise UserError(
            f"cluster: {address}: {_reason(error)}; start one with `ray start --head`, {_ALLOWED}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _join(place: str, options: dict[str, Any]) -> None:
    """`ray.init`. For Ray Client more than once: the process that it starts for a client may crash before it is one
    (gRPC beside a fork, https://github.com/ray-project/ray/issues/63202)."""
    import ray

    for left in (2, 1, 0) if place.startswith("ray://") else (0,):
        try:
            ray.init(address=place, **options)
            return
        except ConnectionError as error:
            if not left or CLIENT_CRASH not in str(error):
                raise
            say(f"cluster: {place}: {_reason(error)}; trying again")
            ray.shutdown()


def _reason(error: Exception) -> str:
    """What Ray says, in one line; where that announces another process's traceback, its last line too."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0]} {lines[-1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]


def check_reachable(address: str) -> None:
    """Raise `UserError` unless something at ``address`` speaks Ray's protocol; Ray itself would try for minutes."""
    import grpc

    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"cluster: {address!r} given; {_ALLOWED}")
    with grpc.insecure_channel(f"{host}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=REACH_SECONDS)
        except grpc.FutureTimeoutError:
            raise UserError(
                f"cluster: {address}: no Ray there, tried for {REACH_SECONDS:.0f} seconds; start its head with "
                "`ray start --head`, or correct the address"
            ) from None
