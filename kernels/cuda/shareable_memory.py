"""GPU memory that other processes of this machine can map: allocated with a file descriptor that stands for it.

Life cycle: `allocate` here, pass the descriptor to another process (socket.send_fds), `map_shared` there. The descriptors are
closed then; the memory and its mappings last as long as the processes. Kernels read and write it by address, over NVLink where
it lies on another GPU. The driver's virtual memory calls do it; multicast has no part in it.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

import torch

from .driver import check, driver, ensure_context

# Numbers of cuda.h.
_PINNED, _FILE_DESCRIPTOR, _ON_DEVICE, _READ_WRITE, _MINIMUM = 1, 1, 1, 3, 0


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _AllocationProperties(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("win32_metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


@dataclass(frozen=True, kw_only=True)
class ShareableMemory:
    """`num_bytes` at `address` in this process. Whoever holds `descriptor` can map it, and closes it."""

    address: int
    num_bytes: int
    descriptor: int


def allocate(num_bytes: int, device_index: int) -> ShareableMemory:
    """At least `num_bytes`, on this GPU. CudaError where the driver refuses."""
    ensure_context(device_index)
    properties = _AllocationProperties(_PINNED, _FILE_DESCRIPTOR, _Location(_ON_DEVICE, device_index))
    granularity, handle, descriptor = ctypes.c_size_t(), ctypes.c_uint64(), ctypes.c_int()
    status = driver().cuMemGetAllocationGranularity(ctypes.byref(granularity), ctypes.byref(properties), ctypes.c_int(_MINIMUM))
    check(status, "cuMemGetAllocationGranularity")
    num_bytes = -(-num_bytes // granularity.value) * granularity.value
    size, none = ctypes.c_size_t(num_bytes), ctypes.c_uint64(0)
    status = driver().cuMemCreate(ctypes.byref(handle), size, ctypes.byref(properties), none)
    check(status, f"cuMemCreate of {num_bytes} bytes")
    status = driver().cuMemExportToShareableHandle(ctypes.byref(descriptor), handle, ctypes.c_int(_FILE_DESCRIPTOR), none)
    check(status, "cuMemExportToShareableHandle")
    return ShareableMemory(address=_map(handle, num_bytes, device_index), num_bytes=num_bytes, descriptor=descriptor.value)


def map_shared(descriptor: int, num_bytes: int, device_index: int) -> int:
    """The address, for this GPU, of memory that another process allocated; closes the descriptor. CudaError where it cannot."""
    ensure_context(device_index)
    handle = ctypes.c_uint64()
    status = driver().cuMemImportFromShareableHandle(
        ctypes.byref(handle), ctypes.c_void_p(descriptor), ctypes.c_int(_FILE_DESCRIPTOR)
    )
    os.close(descriptor)
    check(status, "cuMemImportFromShareableHandle")
    return _map(handle, num_bytes, device_index)


def fill(memory: ShareableMemory, word: int) -> None:
    """Writes the 32-bit word all over, and waits until it is there."""
    status = driver().cuMemsetD32_v2(
        ctypes.c_uint64(memory.address), ctypes.c_uint(word), ctypes.c_size_t(memory.num_bytes // 4)
    )
    check(status, "cuMemsetD32")
    check(driver().cuCtxSynchronize(), "cuCtxSynchronize")


def bytes_at(address: int, num_bytes: int) -> torch.Tensor:
    """uint8, of this GPU's memory at the address, which has no share in the memory's life."""
    return torch.as_tensor(_Bytes(address, num_bytes))


class _Bytes:
    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {"shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3}


def _map(handle: ctypes.c_uint64, num_bytes: int, device_index: int) -> int:
    address, size, none = ctypes.c_uint64(), ctypes.c_size_t(num_bytes), ctypes.c_uint64(0)
    check(driver().cuMemAddressReserve(ctypes.byref(address), size, ctypes.c_size_t(0), none, none), "cuMemAddressReserve")
    check(driver().cuMemMap(address, size, ctypes.c_size_t(0), handle, none), "cuMemMap")
    access = _Access(_Location(_ON_DEVICE, device_index), _READ_WRITE)
    check(driver().cuMemSetAccess(address, size, ctypes.byref(access), ctypes.c_size_t(1)), "cuMemSetAccess")
    return address.value
