"""Model directories in the user's cache: each appears whole, or not at all.

    PILOTFISH_CACHE (default ~/.cache/pilotfish)
    └── models/
        ├── smollm2-135m/                    a published model; its pilotfish.json lists every file with its size
        ├── .smollm2-135m.building-x1y2/     a build that runs (or one that was killed: the next build removes it)
        └── .smollm2-135m.lock               held while building; the kernel frees it when its holder dies

A build writes into its own directory beside the target, is flushed to disk, and is renamed into place as its last act.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..common.errors import ModelLoadError

logger = logging.getLogger(__name__)

MANIFEST = "pilotfish.json"
LAYOUT_VERSION = 1  # raise it when the converter writes something else: older directories are then built again
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFull(ModelLoadError):
    """The cache's disk, quota or file size limit cannot hold the model."""


def models_directory() -> Path:
    """Where published models lie; PILOTFISH_CACHE moves the cache."""
    root = os.environ.get("PILOTFISH_CACHE") or "~/.cache/pilotfish"
    return Path(root).expanduser().absolute() / "models"


def directory_problem(target: Path, *, source_sha256: str) -> str | None:
    """Why `target` is not a whole model made from this source, or None when it is."""
    try:
        manifest = json.loads((target / MANIFEST).read_text())
        if manifest["layout_version"] != LAYOUT_VERSION:
            return f"it was made by another version of pilotfish (layout {manifest['layout_version']}, not {LAYOUT_VERSION})"
        if manifest["source_sha256"] != source_sha256:
            return "it was made from another source"
        for name, num_bytes in manifest["files"].items():
            found_bytes = (target / name).stat().st_size
            if found_bytes != num_bytes:
                return f"{name} has {found_bytes} bytes, not {num_bytes}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing" if target.is_dir() else "it is not there"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"it is damaged ({error})"
    return None


def ensure_published(
    target: Path,
    build: Callable[[Path, Path], None],
    *,
    source_sha256: str,
    lock_timeout_s: float = 900.0,
) -> None:
    """Make `target` whole: at once if it is, else by `build(scratch, model)`, which fills the empty directory `model` and may
    use `scratch` around it for what is thrown away.

    One builder at a time; others wait up to `lock_timeout_s` and then use its result.

    Raises:
        DiskFull: the disk filled while building.
        ModelLoadError: the cache cannot be written, or another build did not end in time.

    Other errors of `build` pass through.
    """
    if directory_problem(target, source_sha256=source_sha256) is None:
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target, timeout_s=lock_timeout_s):
            if directory_problem(target, source_sha256=source_sha256) is not None:
                _build(target, build, source_sha256=source_sha256)
    except Timeout as error:
        raise ModelLoadError(
            f"another process has been building {target} for over {lock_timeout_s:.0f} s: wait for it or end it, then try again"
        ) from error
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS:
            raise disk_full(os.strerror(error.errno)) from error
        raise ModelLoadError(
            f"cannot write {target}: {error}. Fix that, or set PILOTFISH_CACHE to a directory that you can write"
        ) from error


def require_free_bytes(num_bytes: int) -> None:
    """For a build to call before it writes.

    Raises:
        DiskFull: fewer are free.
    """
    free_bytes = shutil.disk_usage(models_directory()).free
    if free_bytes < num_bytes:
        raise disk_full(f"{num_bytes / 1e6:.0f} MB are needed and {free_bytes / 1e6:.0f} MB are free")


def disk_full(reason: str) -> DiskFull:
    return DiskFull(
        f"no room in {models_directory()}: {reason}. Free some space, or set PILOTFISH_CACHE to a directory on another disk; "
        "nothing was left behind"
    )


@contextmanager
def _lock(target: Path, *, timeout_s: float) -> Iterator[None]:
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is building %s: waiting for it, at most %.0f s", target, timeout_s)
        lock.acquire(timeout=timeout_s)
    try:
        yield
    finally:
        lock.release()


def _build(target: Path, build: Callable[[Path, Path], None], *, source_sha256: str) -> None:
    """Build and publish, with the lock held."""
    prefix = f".{target.name}.building-"
    for stale in target.parent.glob(f"{prefix}*"):  # we hold the lock, so whoever made these is dead
        shutil.rmtree(stale)
    scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        model = scratch / "model"
        model.mkdir()
        build(scratch, model)
        _seal(model, source_sha256=source_sha256)
        if target.exists():  # damaged or old; between the two renames there is no model, which is true
            target.rename(scratch / "replaced")
        model.rename(target)
        _flush(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _seal(model: Path, *, source_sha256: str) -> None:
    """Write the manifest and flush every file, so that a power cut after the rename cannot leave an empty file."""
    files = {path.name: path.stat().st_size for path in sorted(model.iterdir())}
    manifest = {"layout_version": LAYOUT_VERSION, "source_sha256": source_sha256, "files": files}
    (model / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    for path in model.iterdir():
        _flush(path)
    _flush(model)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
