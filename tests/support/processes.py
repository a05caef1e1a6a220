"""Processes of tests: forks of Python's fork server, which has imported what ranks need, seconds for each of them, once."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

_PRELOADED = [
    "torch.distributed",
    "transformers.models.llama.configuration_llama",
    "pilotfish.workers.engine",
    "pilotfish.workers.ranks",
]


def preloaded_processes() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context
