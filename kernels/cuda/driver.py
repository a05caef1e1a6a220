"""The CUDA driver through ctypes: its calls by name, their errors with the driver's own words."""

from __future__ import annotations

import ctypes
import functools


class CudaError(RuntimeError):
    """The CUDA driver refused a call; the message has its reason."""


@functools.cache
def driver() -> ctypes.CDLL:
    """OSError where there is none."""
    return ctypes.CDLL("libcuda.so.1")


def check(status: int, what: str) -> None:
    """CudaError, which says `what` was refused, unless `status` is that of success."""
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise CudaError(f"{what}: {(text.value or b'unknown error').decode()} ({status})")


def ensure_context(device_index: int) -> None:
    """A thread that has not called CUDA itself yet has no current context: gives it torch's."""
    context = ctypes.c_void_p()
    check(driver().cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    if context.value is None:
        check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device_index), "cuDevicePrimaryCtxRetain")
        check(driver().cuCtxSetCurrent(context), "cuCtxSetCurrent")
