"""Calls of the C++ kernels, with the public ops' parameters.

The public ops have checked shapes and dtypes, and `supports` has said yes; here only what C++ needs is arranged: addresses,
strides and empty outputs. Calls cost microseconds, so nothing else belongs here.
"""

from __future__ import annotations

import ctypes
import itertools
from functools import cache

import torch

from . import library

_F32, _BF16 = torch.float32, torch.bfloat16
_WEIGHTS = (_F32, _BF16)
# The dtypes each op's twin takes, in the order in which the op names its tensors to `supports`.
_TWINS: dict[str, set[tuple[torch.dtype, ...]]] = {
    "linear": set(itertools.product([_F32], _WEIGHTS)),
}


@cache
def supports(op: str, *dtypes: torch.dtype) -> bool:
    """Whether `op` has a twin for these dtypes on this machine. The first call may compile the library."""
    return dtypes in _TWINS.get(op, ()) and library.load() is not None


@cache
def _kernels() -> ctypes.CDLL:
    loaded = library.load()
    assert loaded is not None, "supports() said no"
    return loaded


def linear(x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    num_rows, size = x_MK.shape
    num_columns = weight_NK.shape[0]
    y_MN = torch.empty(num_rows, num_columns)
    kernels = _kernels()
    run = kernels.pilotfish_linear_f32 if weight_NK.dtype is _F32 else kernels.pilotfish_linear_bf16
    run(
        x_MK.data_ptr(),
        x_MK.stride(0),
        weight_NK.data_ptr(),
        weight_NK.stride(0),
        None if bias_N is None else bias_N.data_ptr(),
        y_MN.data_ptr(),
        num_columns,
        num_rows,
        num_columns,
        size,
        torch.get_num_threads(),
    )
    return y_MN
