"""CUDA C++ kernels for compute capability 9.0: compiled at first use, launched through the CUDA driver.

Life cycle: the first `load` of a source with some macros compiles it with NVRTC into the cache of the C++ kernels
(cpu/library.py), under a name that hashes source and flags, and loads it for the life of the process; later processes only
load it. Where there is no NVRTC or it fails, `load` logs one warning with the reason and returns None, then and from then
on, for what is not in the cache; whoever asked uses another kernel. What is going to be asked for can be compiled ahead, by
`compile_into_cache` on many threads (compile_ahead.py).

NVRTC is called through `cuda.bindings`, which finds it, the driver through ctypes: a CUtensorMap must lie at a multiple of
64 bytes, and the bindings' own does not; besides, building their launch configurations takes longer than a short kernel.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from ..cpu.library import cache_dir
from .driver import check, driver, ensure_context

logger = logging.getLogger(__name__)

SOURCE_DIR = Path(__file__).parent
HEADERS = (  # what a source may include
    "device.cuh",
    "hopper.cuh",
    "streaming.cuh",
    "race.cuh",
    "route.cuh",
    "layer_chunks.cuh",
    "peers.cuh",
    "prefill_products.cuh",
    "prefill_tiles.cuh",
    "tall.cuh",
)
CAPABILITY = (9, 0)
CTA_SHARED_BYTES = 227 * 1024  # that a CTA may have, static ones included
MAX_SHARED_BYTES = CTA_SHARED_BYTES - 4 * 1024  # dynamic ones beside 4 KiB of static ones
INSTALL_HINT = (
    "install NVRTC and its bindings (`pip install 'cuda-bindings[all]'`), of the CUDA version that torch was built for"
)
_FLAGS = ("--gpu-architecture=sm_90a", "-std=c++17")

Macros = tuple[tuple[str, int], ...]

# Numbers of cuda.h.
_STATIC_SHARED_SIZE, _MAX_DYNAMIC_SHARED_SIZE, _PREFERRED_SHARED_CARVEOUT = 1, 8, 9
_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6
_DATA_TYPES = {torch.float16: 6, torch.bfloat16: 9}
_NO_INTERLEAVE, _SWIZZLE_128_BYTES, _PROMOTE_TO_256_BYTES, _FILL_WITH_ZEROS = 0, 3, 3, 0


class BuildError(Exception):
    """A CUDA C++ kernel could not be compiled here; the message says why and what to do."""


class _LaunchAttribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_uint32 * 16))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


@dataclass(frozen=True)
class Kernel:
    """A function on one device, for `launch`."""

    function: int
    device_index: int


class TensorMap:
    """128 bytes that describe a matrix in device memory to the copy engine; an argument of `launch`."""

    def __init__(self) -> None:
        self._memory = (ctypes.c_uint8 * 192)()
        self.address = -(-ctypes.addressof(self._memory) // 64) * 64


Argument = TensorMap | ctypes.c_int | ctypes.c_uint32 | ctypes.c_uint64 | ctypes.c_float | ctypes.c_void_p | ctypes.Array

_lock = threading.Lock()
_failure: str | None = None  # why nothing can be compiled in this process, once that was tried in vain
_NOTED = 0  # no function
_noted: ContextVar[dict[tuple[str, Macros], None] | None] = ContextVar("noted_cuda_kernels", default=None)


def unavailable_reason() -> str | None:
    """Why `load` compiles nothing more, or None where it has not failed yet."""
    return _failure


@functools.cache
def can_run_on(device: torch.device) -> bool:
    """Whether it is a GPU of the CAPABILITY that the kernels are for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == CAPABILITY


def misplaced_reason(name: str, device: torch.device) -> str | None:
    """Why no kernel can run where `name` lies, or None."""
    if can_run_on(device):
        return None
    return f"it is for compute capability {'.'.join(map(str, CAPABILITY))}, {name} is on {device}"


def is_served(source: str, unfit_reason: str | None, *, instead: str) -> bool:
    """Whether there is no reason against it. A reason is logged once, with what does the work `instead`."""
    if unfit_reason is not None and _failure is None:  # without a compiler `load` has warned itself
        warn_unserved(source, unfit_reason, instead)
    return unfit_reason is None


@functools.cache
def warn_unserved(source: str, reason: str, instead: str) -> None:
    """Once a reason."""
    logger.warning("%s does not serve a layer that the tuned table gives it, %s: %s", source, instead, reason)


def load(source: str, macros: Macros, device_index: int) -> Kernel | None:
    """The function of the name of `source`.cu, compiled with `macros`; None where it cannot be had.

    Quick from the second time on; a caller does not keep it, for within `only_noted` it is none that can be launched.
    """
    noted = _noted.get()
    if noted is None:
        return load_once(source, macros, device_index)
    if _failure is not None and not cubin_path(source, macros).exists():
        return None
    noted[source, macros] = None
    return Kernel(_NOTED, device_index)


@contextmanager
def only_noted() -> Iterator[dict[tuple[str, Macros], None]]:
    """In the body, on this thread, `load` notes here what it is asked for and compiles nothing, and `launch` does nothing."""
    noted: dict[tuple[str, Macros], None] = {}
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def compile_into_cache(source: str, macros: Macros) -> None:
    """Compiles what is not in the cache yet; any thread may. Where that is impossible `load` will meet it and say why."""
    path = cubin_path(source, macros)
    if not path.exists():
        with suppress(BuildError):
            build(source, macros, path)


@functools.cache
def load_once(source: str, macros: Macros, device_index: int) -> Kernel | None:
    """`load` of what has not been loaded yet."""
    global _failure  # noqa: PLW0603 - one compiler a process, so one failure
    with _lock:
        path = cubin_path(source, macros)
        if not path.exists():
            if _failure is not None:
                return None
            logger.info("compiling the CUDA C++ kernel %s into %s", source, path)
            try:
                build(source, macros, path)
            except BuildError as error:
                logger.warning("no CUDA C++ kernels, slower ones serve in their place: %s", error)
                _failure = str(error)
                return None
        return _load_function(path, source, device_index)


def cubin_path(source: str, macros: Macros) -> Path:
    """Where the compiled kernel lies or will lie."""
    code = b"".join((SOURCE_DIR / name).read_bytes() for name in (f"{source}.cu", *HEADERS))
    digest = hashlib.sha256(code + "\0".join(_compile_options(macros)).encode())
    return cache_dir() / f"{source}-{digest.hexdigest()[:24]}.cubin"


def build(source: str, macros: Macros, path: Path) -> None:
    """Compiles into `path`, which appears complete or not at all. BuildError where that is impossible."""
    cubin = compile_source((SOURCE_DIR / f"{source}.cu").read_bytes(), f"{source}.cu", _compile_options(macros))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as scratch:
            written = Path(scratch) / path.name
            written.write_bytes(cubin)
            os.replace(written, path)
    except OSError as error:
        raise BuildError(f"cannot write a compiled kernel to {path.parent}: {error}; set PILOTFISH_CACHE") from error


def compile_source(code: bytes, name: str, options: Sequence[str]) -> bytes:
    """The cubin of code that may include HEADERS. BuildError with the compiler's own words where there is none."""
    nvrtc = _import_nvrtc()
    words = [option.encode() for option in options]
    headers, names = [(SOURCE_DIR / header).read_bytes() for header in HEADERS], [header.encode() for header in HEADERS]
    try:
        status, program = nvrtc.nvrtcCreateProgram(code, name.encode(), len(headers), headers, names)
    except RuntimeError as error:  # the bindings are there, the library is not
        raise BuildError(f"NVRTC does not load ({' '.join(str(error).split())}): {INSTALL_HINT}") from error
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise BuildError(f"NVRTC does not start ({status.name}): {INSTALL_HINT}")
    (status,) = nvrtc.nvrtcCompileProgram(program, len(words), words)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = _nvrtc_bytes(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        lines = "\n".join(log.decode(errors="replace").strip("\0 \n").splitlines()[:20])
        raise BuildError(f"NVRTC cannot compile {name} ({status.name}): {INSTALL_HINT}\n{lines}")
    cubin = _nvrtc_bytes(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    nvrtc.nvrtcDestroyProgram(program)
    return cubin


def tensor_map(address: int, dtype: torch.dtype, shape: tuple[int, int], row_stride: int, box: tuple[int, int]) -> TensorMap:
    """That of a matrix [rows, columns] of 16-bit numbers at `address`, read in boxes of `box`; see `tensor_map_of`."""
    return tensor_map_of(address, dtype, shape, (row_stride,), box)


@functools.lru_cache(maxsize=8192)
def tensor_map_of(
    address: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
) -> TensorMap:
    """That of a tensor of two to five dimensions of 16-bit numbers, read in boxes of `box`, of 128 bytes a row, swizzled.

    `strides` in numbers, of all dimensions but the last; the address and the strides are multiples of 16 bytes. Outside of the
    tensor zeros are read. The map follows from the arguments alone, so one is kept for each.
    """
    target, rank = TensorMap(), len(shape)
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(target.address),
        ctypes.c_int(_DATA_TYPES[dtype]),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*reversed(shape)),
        (ctypes.c_uint64 * (rank - 1))(*(stride * dtype.itemsize for stride in reversed(strides))),
        (ctypes.c_uint32 * rank)(*reversed(box)),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        ctypes.c_int(_NO_INTERLEAVE),
        ctypes.c_int(_SWIZZLE_128_BYTES),
        ctypes.c_int(_PROMOTE_TO_256_BYTES),
        ctypes.c_int(_FILL_WITH_ZEROS),
    )
    check(status, f"cuTensorMapEncodeTiled of {shape} {dtype}, strides {strides}, box {box}")
    return target


def launch(
    kernel: Kernel,
    arguments: Sequence[Argument],
    *,
    grid: tuple[int, int],
    num_threads: int,
    shared_bytes: int,
    cluster_size: int = 1,
    early_start: bool = False,
) -> None:
    """Launches on torch's current stream, also while that is captured. `cluster_size` CTAs along x form a cluster.

    With `early_start` it starts while the kernel before it ends, by the rules of dependent_launch.py.
    """
    if _noted.get() is not None:
        return
    assert kernel.function != _NOTED, "a kernel was kept from a rehearsal"
    ensure_context(kernel.device_index)
    addresses = [argument.address if isinstance(argument, TensorMap) else ctypes.addressof(argument) for argument in arguments]
    attributes, num_attributes = _attributes(cluster_size, early_start)
    config = _LaunchConfig(
        (*grid, 1), (num_threads, 1, 1), shared_bytes, torch.cuda.current_stream().cuda_stream, attributes, num_attributes
    )
    parameters = (ctypes.c_void_p * len(addresses))(*addresses)
    status = driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(kernel.function), parameters, None)
    if status:
        check(
            status, f"cuLaunchKernelEx of grid {grid}, {num_threads} threads, {shared_bytes} bytes, clusters of {cluster_size}"
        )


def _compile_options(macros: Macros) -> tuple[str, ...]:
    return (*_FLAGS, *(f"-D{name}={value}" for name, value in macros))


def _import_nvrtc() -> ModuleType:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise BuildError(f"no NVRTC ({error}): {INSTALL_HINT}") from error
    return nvrtc


def _nvrtc_bytes(get_size, get_bytes, program) -> bytes:
    _, size = get_size(program)
    content = b" " * size
    get_bytes(program, content)
    return content


def _load_function(path: Path, name: str, device_index: int) -> Kernel:
    ensure_context(device_index)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    check(driver().cuModuleLoadData(ctypes.byref(module), path.read_bytes()), f"cuModuleLoadData of {path}; remove it")
    check(driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"cuModuleGetFunction of {name}")
    static_bytes = ctypes.c_int()
    check(driver().cuFuncGetAttribute(ctypes.byref(static_bytes), _STATIC_SHARED_SIZE, function), "cuFuncGetAttribute")
    max_dynamic = CTA_SHARED_BYTES - static_bytes.value
    for attribute, value in ((_MAX_DYNAMIC_SHARED_SIZE, max_dynamic), (_PREFERRED_SHARED_CARVEOUT, 100)):
        check(driver().cuFuncSetAttribute(function, attribute, value), f"cuFuncSetAttribute {attribute} = {value}")
    assert function.value is not None
    return Kernel(function.value, device_index)


@functools.cache
def _attributes(cluster_size: int, early_start: bool) -> tuple[ctypes.Array[_LaunchAttribute], int]:
    attributes = []
    if cluster_size > 1:
        attributes.append(_LaunchAttribute(_CLUSTER_DIMENSION, 0, (ctypes.c_uint32 * 16)(cluster_size, 1, 1)))
    if early_start:
        attributes.append(_LaunchAttribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (ctypes.c_uint32 * 16)(1)))
    return (_LaunchAttribute * 2)(*attributes), len(attributes)
