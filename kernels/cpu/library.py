"""The compiled library of C++ kernels of this machine.

Life cycle: the first `load` compiles the sources beside this file with the system's compiler (`CXX`, else g++, c++ or
clang++) into `$PILOTFISH_CACHE/kernels` (default ~/.cache/pilotfish/kernels), under a name that hashes the sources, the
flags and the processor, and loads it for the life of the process; later processes only load it. Where there is no compiler
or it fails, `load` logs one warning with the reason and returns None, and the ops run their torch references.

The library has helper threads of its own (parallel.h says why not OpenMP); calls say how many may take part.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

logger = logging.getLogger(__name__)

BUILD_TIMEOUT_S = 300.0
SOURCE_DIR = Path(__file__).parent
COMPILERS = ("g++", "c++", "clang++")
INSTALL_HINT = "install a C++ compiler (`apt install g++`, `dnf install gcc-c++`) or set CXX"
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-ffp-contract=off", "-fvisibility=hidden")

# Parameters of every exported function, a letter each: pointer, int64, float.
_PARAMETER_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
_SIGNATURES = {
    "pilotfish_embedding_f32": "pi" + "pii" + "p" + "ii" + "i",
    "pilotfish_embedding_bf16": "pi" + "pii" + "p" + "ii" + "i",
    "pilotfish_linear_f32": "pipippiiiii",
    "pilotfish_linear_bf16": "pipippiiiii",
    "pilotfish_paged_attention_f32": "pii" + "piii" + "piii" + "pi" + "pppp" + "iiiiifif" + "i",
    "pilotfish_rms_norm_f32": "piiii" + "pi" + "pf" + "ppi" + "i",
    "pilotfish_rms_norm_bf16": "piiii" + "pi" + "pf" + "ppi" + "i",
    "pilotfish_apply_rotary": "piii" + "piii" + "pi" + "pi" + "pi" + "ii" + "i",
    "pilotfish_gated_activation": "pi" + "pii" + "i" + "i",
    "pilotfish_store_kv": "pii" + "pii" + "piii" + "piii" + "p" + "iiiii" + "i",
    "pilotfish_route_tokens": "pi" + "pp" + "iiii" + "i",
    "pilotfish_moe_mlp_f32": "pi" + "pii" + "pii" + "ppp" + "iiiiii" + "i",
    "pilotfish_moe_mlp_bf16": "pi" + "pii" + "pii" + "ppp" + "iiiiii" + "i",
    "pilotfish_sample": "pi" + "pppppp" + "p" + "ii" + "i",
    "pilotfish_race": "pi" + "ppp" + "pp" + "iii" + "i",
    "pilotfish_apply_penalties": "pi" + "pi" + "pi" + "pppp" + "ii" + "i",
    "pilotfish_gather_logprobs": "pi" + "p" + "pppp" + "iii" + "i",
}


class BuildError(Exception):
    """The C++ kernels could not be built or loaded here; the message says why and what to do."""


_lock = threading.Lock()
_outcome: tuple[ctypes.CDLL | None, str | None] | None = None  # (library, reason for having none) once tried


def load() -> ctypes.CDLL | None:
    """The library, built first if need be (some seconds, once a machine); None where it cannot be had."""
    return _load_once()[0]


@functools.cache
def kernels() -> ctypes.CDLL:
    """The library's functions, for callers that know it is there."""
    library = load()
    assert library is not None, "ask `supports` first"
    return library


def unavailable_reason() -> str | None:
    """Why `load` returns None, or None if it returns the library."""
    return _load_once()[1]


def _load_once() -> tuple[ctypes.CDLL | None, str | None]:
    global _outcome  # noqa: PLW0603 - a shared library is loaded once a process
    with _lock:
        if _outcome is None:
            try:
                _outcome = (_open(build(cache_dir())), None)
            except BuildError as error:
                logger.warning("no C++ kernels, ops run their slower torch references: %s", error)
                _outcome = (None, str(error))
        return _outcome


def cache_dir() -> Path:
    """Where compiled libraries live: $PILOTFISH_CACHE/kernels, default ~/.cache/pilotfish/kernels."""
    return Path(os.environ.get("PILOTFISH_CACHE") or "~/.cache/pilotfish").expanduser() / "kernels"


def build(directory: Path) -> Path:
    """The library's path in `directory`, compiled if it is not there. BuildError where that is impossible.

    One process compiles at a time, into a folder of its own; those that waited find the library there.
    """
    sources, flags = sorted(SOURCE_DIR.glob("*.cpp")), (*_FLAGS, _processor_flag())
    target = directory / f"{_key(flags)}.so"
    if target.exists():
        return target
    compiler = find_compiler()
    logger.info("compiling the C++ kernels into %s", target)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _alone(directory), tempfile.TemporaryDirectory(dir=directory, prefix="build-") as scratch:
            if target.exists():
                return target
            objects = [f"{scratch}/{source.stem}.o" for source in sources]
            commands = [
                [*compiler, *flags, "-c", str(source), "-o", target_object]
                for source, target_object in zip(sources, objects, strict=True)
            ]
            with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                list(pool.map(_run, commands))
            _run([*compiler, "-shared", "-pthread", "-o", f"{scratch}/kernels.so", *objects])
            os.replace(f"{scratch}/kernels.so", target)
    except OSError as error:
        raise BuildError(f"cannot write the compiled kernels to {directory}: {error}; set PILOTFISH_CACHE") from error
    return target


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Until no other process builds there. One that takes too long is not waited for: two builds have the same content."""
    deadline_s = time.monotonic() + BUILD_TIMEOUT_S
    lock = os.open(directory, os.O_RDONLY)
    try:
        while time.monotonic() < deadline_s:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.05)
        yield
    finally:
        os.close(lock)


def find_compiler() -> list[str]:
    """The command of the C++ compiler, as words. BuildError if there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [[name] for name in COMPILERS]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    tried = ", ".join(command[0] for command in candidates)
    raise BuildError(f"no C++ compiler found (tried {tried}): {INSTALL_HINT}")


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise BuildError(f"`{shlex.join(command)}` took more than {BUILD_TIMEOUT_S:.0f} s") from None
    except OSError as error:
        raise BuildError(f"`{command[0]}` does not start ({error}): {INSTALL_HINT}") from error
    if done.returncode != 0:
        message = "\n".join((done.stderr or done.stdout).strip().splitlines()[:20])
        raise BuildError(f"`{shlex.join(command)}` failed with status {done.returncode}: {INSTALL_HINT}\n{message}")


def _open(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load: {error}; remove it to build it anew") from error
    for name, parameters in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = [_PARAMETER_TYPES[letter] for letter in parameters]
        function.restype = None
    return library


def _key(flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for source in sorted([*SOURCE_DIR.glob("*.cpp"), *SOURCE_DIR.glob("*.h")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    words = (*flags, os.environ.get("CXX", ""), platform.machine(), _processor())
    digest.update("\0".join(words).encode())
    return digest.hexdigest()[:24]


def _processor_flag() -> str:
    return "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"


def _processor() -> str:
    """What tells apart processors that a home directory may be shared between: model and instruction sets."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in cpuinfo.read_text().splitlines() if line.startswith(names)}))
