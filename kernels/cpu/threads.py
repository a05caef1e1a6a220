"""How many threads a computing thread's kernels use, and how many torch's own ops.

The kernels have helper threads of their own (parallel.cpp). OpenMP's, which torch starts for larger ops, spin for milliseconds
after each and so take the helpers' cores. A thread that computes with the kernels therefore leaves torch one thread; others of
the process keep theirs.
"""

from __future__ import annotations

import ctypes
import logging
import threading

import torch

logger = logging.getLogger(__name__)
_of_thread = threading.local()


def num_threads() -> int:
    """For the calling thread's kernels: what `use_threads` said, else as many as torch uses."""
    number: int | None = getattr(_of_thread, "num_threads", None)
    return number or torch.get_num_threads()


def use_threads(number: int) -> None:
    """The calling thread's kernels use `number` threads from now on, and torch's own ops one."""
    _of_thread.num_threads = number
    torch.get_num_threads()  # torch sets OpenMP's number of a thread once, at its first question
    try:
        ctypes.CDLL("libgomp.so.1").omp_set_num_threads(1)  # of the calling thread alone, as torch.set_num_threads is not
    except (OSError, AttributeError) as error:
        logger.info("torch keeps OpenMP threads beside the kernels' own: %s", error)
