"""Processes of tests: forks of Python's fork server, which has imported what ranks need, seconds for each of them, once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerContext

_PRELOADED = [
    "torch.distributed",
    "pilotfish.workers.engine",
    "pilotfish.workers.ranks",
]


def preloaded_processes() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def children_end(timeout_s: float = 5.0) -> bool:
    """Whether no process of this one is left; one that was killed from another thread may be seen for a moment."""
    deadline = time.monotonic() + timeout_s
    while multiprocessing.active_children():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that stands still: what it works on is not over before the block is."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it was killed meanwhile
            os.kill(pid, signal.SIGCONT)
