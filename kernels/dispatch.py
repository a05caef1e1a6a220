"""Which backend serves an op: Triton on CUDA, the C++ twin on the CPU, the torch reference where asked for.

`PILOTFISH_KERNELS` is read once, at the first op: `auto` (the default) dispatches on the tensor's device; `ref` forces the
references everywhere, to find out whether a kernel is to blame; `invariant` is auto with one kernel, cut in one way, for any
number of rows on CUDA, so that a row's bits do not depend on the rows beside it, on how its prompt is cut into chunks, nor on
what was cached. It costs time. Kernels of the CPU are so anyway. A CPU op that has no twin for its dtypes runs its
reference, which is logged once; `backend_report` says what serves which device and why.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
import triton

from .cpu import library
from .cpu import ops as cpu_ops

logger = logging.getLogger(__name__)

Backend = Literal["reference", "cpp", "triton"]
MODES = ("auto", "invariant", "ref")


@cache
def kernel_mode() -> str:
    """The value of PILOTFISH_KERNELS, one of MODES. ValueError for anything else."""
    mode = os.environ.get("PILOTFISH_KERNELS", "auto")
    if mode not in MODES:
        raise ValueError(f"PILOTFISH_KERNELS={mode!r} is not known: use one of {', '.join(MODES)}")
    return mode


def choose_backend(op: str, *tensors: torch.Tensor) -> Backend:
    """The backend that runs `op` on tensors of these dtypes on their one device.

    ValueError where the tensors lie on more than one device or on one that no backend serves.
    """
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device:
            raise ValueError(f"{op}: tensors on {device} and on {tensor.device}: move them to one device")
    backend = _choose(op, device, *[tensor.dtype for tensor in tensors])
    if backend == "triton" and device.index != torch.cuda.current_device():
        # Triton launches on the current device, wherever its tensors are.
        current = f"cuda:{torch.cuda.current_device()}"
        raise ValueError(f"{op}: tensor on {device}, current device {current}: call torch.cuda.set_device first")
    return backend


@cache
def _choose(op: str, device: torch.device, *dtypes: torch.dtype) -> Backend:
    """Cached, for it runs at every op; so a reference instead of a twin is logged once."""
    if kernel_mode() == "ref":
        return "reference"
    if device.type == "cuda":
        return "triton"
    if device.type != "cpu":
        raise ValueError(f"{op}: no kernel serves device {device}: use cuda or cpu, or set PILOTFISH_KERNELS=ref")
    if cpu_ops.supports(op, *dtypes):
        return "cpp"
    if library.unavailable_reason() is None:  # where there is no C++ library at all, it has warned itself
        logger.warning("%s has no C++ kernel for %s: its torch reference runs", op, ", ".join(map(str, dtypes)))
    return "reference"


def backend_report(device_types: Sequence[str] = ("cpu", "cuda")) -> dict[str, str]:
    """What serves each of these kinds of device on this machine, and why. For "cpu" the C++ kernels are compiled if need be."""
    reports = {"cpu": _cpu_report, "cuda": _cuda_report}
    if kernel_mode() == "ref":
        return dict.fromkeys(device_types, "torch references (PILOTFISH_KERNELS=ref)")
    return {device_type: reports[device_type]() for device_type in device_types}


def _cpu_report() -> str:
    reason = library.unavailable_reason()
    if reason is None:
        return "C++ kernels (torch references for activations other than float32)"
    return f"torch references, slower: {reason}"


def _cuda_report() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device"
    cut = ", one cut for every batch (PILOTFISH_KERNELS=invariant)" if kernel_mode() == "invariant" else ""
    return f"Triton {triton.__version__} on {torch.cuda.get_device_name()}{cut}"
