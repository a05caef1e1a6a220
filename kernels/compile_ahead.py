"""Compiling kernels before their first launch, all at once.

Triton and NVRTC compile a kernel when it is first asked for, so that the first start on a machine would compile dozens one
after another. Instead the steps that are going to run are rehearsed: within `noted_kernels` nothing is launched and nothing
compiled, only noted. Then `compile_all` compiles what was noted on many threads (neither compiler holds the interpreter's lock
for long) into the caches of Triton and of the CUDA C++ kernels, which later processes find full.

Of the rehearsing thread Triton hears a device that does not exist, for which it never has a kernel; so it asks its
`jit_cache_hook`, which notes the kernel and answers that there is nothing to launch. Other threads launch as ever.

What is missed or does not compile here is compiled, and complains, at its first launch.

Keys of Triton's cache on disk must not depend on which kernel comes first, and before Triton 3.9 they do: the constants that a
function uses become part of its caller's key only if the function's own key was known before. From the import of this module on
a callee's key is made first, as 3.9 does.
"""

from __future__ import annotations

import fcntl
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any

import torch
from torch.overrides import TorchFunctionMode
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import DependenciesFinder, JITCallable

from .cpu.library import cache_dir
from .cuda import loader

logger = logging.getLogger(__name__)

TIMEOUT_S = 300.0  # of compiling, and of waiting for another process that does
_QUIET_S = 1.0  # finding kernels in the caches takes less
_NO_DEVICE = -1
_ALLOCATIONS = (torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty, torch.Tensor.new_empty_strided)


def _make_key_of_callee_first() -> None:
    update_hash = DependenciesFinder._update_hash

    def update(self: DependenciesFinder, function: JITCallable) -> None:
        _ = function.cache_key
        update_hash(self, function)

    DependenciesFinder._update_hash = update


_make_key_of_callee_first()
_rehearsing = threading.Lock()  # one at a time: Triton's driver and hook are the process's


@dataclass(frozen=True, slots=True)
class NotedKernels:
    """What a rehearsal would have launched.

    Attributes:
        triton: (name, key) of a kernel to (its jit function, what its `preload` takes).
        cuda: (source, macros) of loader.py; a dict for its order.
    """

    triton: dict[tuple[str, str], tuple[Any, str]] = field(default_factory=dict)
    cuda: dict[tuple[str, loader.Macros], None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.triton) + len(self.cuda)


@contextmanager
def noted_kernels() -> Iterator[NotedKernels]:
    """In the body, on this thread, kernels are noted and neither compiled nor launched.

    torch's own operations run: what a kernel would have written is zero where it is newly allocated, so that whatever is used
    as an index is a valid one.
    """
    with _rehearsing, loader.only_noted() as cuda:
        noted = NotedKernels(cuda=cuda)
        actual_driver, actual_hook = driver.active, knobs.runtime.jit_cache_hook

        def note(**about: Any) -> bool | None:
            if about["compile"]["device"] != _NO_DEVICE:
                return actual_hook(**about) if actual_hook is not None else None
            function = about["fn"]
            key = (f"{function.module}.{function.name}", about["key"])
            noted.triton.setdefault(key, (function.jit_function, about["compile"]["specialization_data"]))
            return True

        driver.set_active(_RehearsalDriver(actual_driver))
        knobs.runtime.jit_cache_hook = note
        try:
            with _ZeroedAllocations():
                yield noted
        finally:
            knobs.runtime.jit_cache_hook = actual_hook
            driver.set_active(actual_driver)


def compile_all(noted: NotedKernels, *, device: torch.device, num_threads: int) -> bool:
    """Compiles and loads what was noted. Of several processes on this machine one compiles, the others find it done.

    Whether all of it is at hand; what is not has been logged.
    """
    start_s = time.perf_counter()
    jobs = [partial(loader.compile_into_cache, *kernel) for kernel in noted.cuda]  # first, for some take the longest
    for (_, key), (function, specialization) in noted.triton.items():
        loaded, *_ = function.device_caches[device.index]  # looked up here: threads would each make one
        if key not in loaded:
            jobs.append(partial(_load_triton, device, function, specialization))
    with _alone_on_this_machine(), ThreadPoolExecutor(num_threads, thread_name_prefix="compile") as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            _, waiting = wait(futures, timeout=_QUIET_S)
            if waiting:
                logger.info("compiling %d kernels, once on this machine", len(waiting))
                _, waiting = wait(futures, timeout=TIMEOUT_S)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    errors = [future.exception() for future in futures if future.done() and not future.cancelled()]
    for error in errors:
        if error is not None:
            logger.warning("a kernel could not be compiled ahead, its first launch compiles it: %s", error)
    num_missing = len(futures) - errors.count(None)
    logger.info(
        "%d of %d kernels are at hand after %.1f s", len(noted) - num_missing, len(noted), time.perf_counter() - start_s
    )
    return num_missing == 0


def _load_triton(device: torch.device, function: Any, specialization: str) -> None:
    torch.cuda.set_device(device)  # of this thread
    kernel = function.preload(specialization)
    _ = kernel.run  # which builds what launches it, and loads both


@contextmanager
def _alone_on_this_machine() -> Iterator[None]:
    """Waits while another process is in such a body; where the cache's folder can have no locks it does not."""
    with ExitStack() as stack:
        folder = cache_dir()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _lock(stack.enter_context((folder / "compiling.lock").open("w")))
        except OSError as error:
            logger.info("kernels may be compiled by several processes at once: %s", error)
        yield


def _lock(file: IO[str]) -> None:
    """Until it is closed. OSError where that is impossible or takes too long."""
    end_s = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end_s:
                raise
        time.sleep(0.05)


class _RehearsalDriver:
    """Triton's driver, but on the thread that makes it there is no device."""

    def __init__(self, actual: Any) -> None:
        self._actual, self._thread = actual, threading.get_ident()

    def get_current_device(self) -> int:
        return _NO_DEVICE if threading.get_ident() == self._thread else self._actual.get_current_device()

    def get_current_stream(self, device: int) -> int:
        return 0 if device == _NO_DEVICE else self._actual.get_current_stream(device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._actual, name)


class _ZeroedAllocations(TorchFunctionMode):
    """New tensors are zero."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.zero_() if func in _ALLOCATIONS else result
