"""Ray, started here or joined, for as long as a command runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..common.errors import Unavailable

NAMESPACE = "pilotfish"


@contextmanager
def ray_session(*, address: str | None = None, namespace: str = NAMESPACE, show_logs: bool = True) -> Iterator[None]:
    """Join the Ray cluster at `address`; None takes RAY_ADDRESS or a cluster that runs on this machine, and else starts one,
    which ends with the session; "local" always starts one, which listens on the loopback address alone.

    Raises:
        Unavailable: Ray cannot be reached or started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 if unset: everything else on the machine would go first
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray  # here, because Ray reads its environment when it is imported

    private = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if address == "local" else {}
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=show_logs, logging_level="ERROR", **private)
    except Exception as error:  # Ray raises the bare class when a process of its own does not start in time
        raise Unavailable(f"cannot {'start' if address == 'local' else 'reach or start'} Ray: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()
