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


def copy(target: int, source: int, num_bytes: int, stream: int) -> None:
    """Queues a copy between addresses of device memory, of which one may lie on another GPU: a copy engine does it.

    May be captured in a CUDA graph. CudaError where the driver refuses.
    """
    status = driver().cuMemcpyDtoDAsync_v2(
        ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(num_bytes), ctypes.c_void_p(stream)
    )
    check(status, f"cuMemcpyDtoDAsync of {num_bytes} bytes")


def ensure_context(device_index: int) -> None:
    """A thread that has not called CUDA itself yet has no current context: gives it torch's."""
    context = ctypes.c_void_p()
    check(driver().cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    if context.value is None:
        check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device_index), "cuDevicePrimaryCtxRetain")
        check(driver().cuCtxSetCurrent(context), "cuCtxSetCurrent")
