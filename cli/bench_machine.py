"""What this device reaches: bytes read a second and FLOP a second, measured in less than a second."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache, partial

import torch

from .bench_roofline import Machine

_TRYING_S = 0.15


@cache
def measure_machine(device: torch.device, *, dtype: torch.dtype) -> Machine:
    """The best of a few tries of each, once a process."""
    machine = Machine(read_bytes_per_s=_read_bytes_per_s(device), flop_per_s=_flop_per_s(device, dtype))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return machine


def _read_bytes_per_s(device: torch.device) -> float:
    """Of a large sum or a large copy, which both reads and writes; the faster one."""
    num_bytes = 2**31 if device.type == "cuda" else 2**28
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    sum_s, copy_s = _best_s(source.sum, device), _best_s(partial(target.copy_, source), device)
    return max(num_bytes / sum_s, 2 * num_bytes / copy_s)


def _flop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Of a large square matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    return float(2 * side**3 / _best_s(partial(torch.mm, matrix, matrix, out=torch.empty_like(matrix)), device))


def _best_s(run: Callable[[], object], device: torch.device) -> float:
    """The shortest of the runs that fit into _TRYING_S, by when a GPU has also raised its clocks."""
    _timed_s(run, device)  # first use loads the kernel
    end_s, best_s = time.perf_counter() + _TRYING_S, math.inf
    while time.perf_counter() < end_s:
        best_s = min(best_s, _timed_s(run, device))
    return best_s


def _timed_s(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start_s = time.perf_counter()
        run()
        return time.perf_counter() - start_s
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
