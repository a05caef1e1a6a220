"""Ray, started here or joined, for as long as a command runs."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..common.errors import Unavailable
from .ray_access import check_access

NAMESPACE = "pilotfish"


@contextmanager
def ray_session(*, address: str | None = None, namespace: str = NAMESPACE, show_logs: bool = True) -> Iterator[None]:
    """Join the Ray cluster at `address`; None takes RAY_ADDRESS or a cluster that runs on this machine, and else starts one,
    which ends with the session; "local" always starts one, which listens on the loopback address alone.

    Raises:
        Unavailable: Ray cannot be reached or started.
    """
    private = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if address == "local" else {}
    try:
        ray = _init(address=address, namespace=namespace, log_to_driver=show_logs, **private)
    except Exception as error:  # Ray raises the bare class when a process of its own does not start in time
        raise Unavailable(f"cannot {'start' if address == 'local' else 'reach or start'} Ray: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def cluster_session(*, address: str = "auto", namespace: str = NAMESPACE) -> Iterator[None]:
    """Join a Ray cluster that runs already.

    Raises:
        Unavailable: there is none at the address, or it does not take us.
    """
    try:
        ray = _init(address=address, namespace=namespace, log_to_driver=False)
    except Exception as error:
        raise Unavailable(
            f"cannot join Ray at {address!r}: {str(error).strip()}\nStart it first (`ray up cluster.yaml`, or `ray start "
            "--head` on this machine) and run this on its head. 'pilotfish serve' needs no running cluster."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _init(*, address: str | None, **options: Any) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 if unset: everything else on the machine would go first
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray  # here, because Ray reads its environment when it is imported
    from ray._private.services import canonicalize_bootstrap_address

    was_found = address in (None, "auto") and not os.environ.get("RAY_ADDRESS")
    if resolved := canonicalize_bootstrap_address(address):  # None: Ray will start a cluster
        check_access(resolved, was_found=was_found)
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(address=address, logging_level="ERROR", **options)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray's own aborts the process after 3 s, whatever it still has to end
    return ray
