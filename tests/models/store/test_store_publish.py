"""Model directories appear whole or not at all: after damage, kills, races and full disks."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pilotfish.common.errors import ModelLoadError
from pilotfish.models.store_publish import (
    LAYOUT_VERSION,
    MANIFEST,
    DiskFull,
    directory_problem,
    ensure_published,
    models_directory,
    require_free_bytes,
)

SHA = "a" * 64


def _build(scratch: Path, model: Path) -> None:
    (scratch / "leftover").write_text("not published")
    (model / "weights").write_bytes(b"w" * 1000)
    (model / "config").write_text("{}")


def _hidden(models: Path) -> list[str]:
    return sorted(path.name for path in models.iterdir() if path.name.startswith(".") and not path.name.endswith(".lock"))


def test_published_directory_has_the_files_and_nothing_else(cache: Path) -> None:
    target = models_directory() / "m"
    assert directory_problem(target, source_sha256=SHA) == "it is not there"
    ensure_published(target, _build, source_sha256=SHA)
    assert directory_problem(target, source_sha256=SHA) is None
    assert sorted(path.name for path in target.iterdir()) == ["config", MANIFEST, "weights"]
    assert _hidden(cache) == []


def test_directory_appears_by_renaming(cache: Path) -> None:
    inodes = []

    def build(scratch: Path, model: Path) -> None:
        _build(scratch, model)
        inodes.append(model.stat().st_ino)

    ensure_published(cache / "m", build, source_sha256=SHA)
    assert inodes == [(cache / "m").stat().st_ino]


def test_whole_directory_is_not_built_again(cache: Path) -> None:
    target = cache / "m"
    ensure_published(target, _build, source_sha256=SHA)
    inode = target.stat().st_ino
    ensure_published(target, _build, source_sha256=SHA)
    assert target.stat().st_ino == inode


def _truncate(target: Path) -> None:
    (target / "weights").write_bytes(b"w" * 999)


def _remove(target: Path) -> None:
    (target / "config").unlink()


def _forget_manifest(target: Path) -> None:
    (target / MANIFEST).unlink()


def _spoil_manifest(target: Path) -> None:
    (target / MANIFEST).write_text("[")


def _older_layout(target: Path) -> None:
    manifest = json.loads((target / MANIFEST).read_text())
    (target / MANIFEST).write_text(json.dumps(manifest | {"layout_version": LAYOUT_VERSION - 1}))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (_truncate, "weights has 999 bytes, not 1000"),
        (_remove, "config is missing"),
        (_forget_manifest, f"{MANIFEST} is missing"),
        (_spoil_manifest, "it is damaged"),
        (_older_layout, "another version"),
    ],
)
def test_damage_is_named_and_repaired_by_the_next_build(cache: Path, damage, problem: str) -> None:
    target = cache / "m"
    ensure_published(target, _build, source_sha256=SHA)
    damage(target)
    found = directory_problem(target, source_sha256=SHA)
    assert found is not None
    assert problem in found
    ensure_published(target, _build, source_sha256=SHA)
    assert directory_problem(target, source_sha256=SHA) is None
    assert _hidden(cache) == []


def test_another_source_replaces_the_directory(cache: Path) -> None:
    target = cache / "m"
    ensure_published(target, _build, source_sha256=SHA)
    ensure_published(target, lambda _scratch, model: (model / "new").touch(), source_sha256="b" * 64)
    assert sorted(path.name for path in target.iterdir()) == ["new", MANIFEST]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_build_leaves_nothing(cache: Path, error: type[BaseException]) -> None:
    def build(scratch: Path, model: Path) -> None:
        _build(scratch, model)
        raise error

    with pytest.raises(error):
        ensure_published(cache / "m", build, source_sha256=SHA)
    assert not (cache / "m").exists()
    assert _hidden(cache) == []


def test_failed_rebuild_keeps_what_was_there(cache: Path) -> None:
    target = cache / "m"
    ensure_published(target, _build, source_sha256=SHA)

    def build(_scratch: Path, _model: Path) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        ensure_published(target, build, source_sha256="b" * 64)
    assert directory_problem(target, source_sha256=SHA) is None


def test_concurrent_callers_build_once(cache: Path) -> None:
    builds = []

    def build(scratch: Path, model: Path) -> None:
        builds.append(threading.get_ident())
        time.sleep(0.1)  # long enough for every other thread to reach the lock
        _build(scratch, model)

    threads = [
        threading.Thread(target=ensure_published, args=(cache / "m", build), kwargs={"source_sha256": SHA}) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(builds) == 1
    assert directory_problem(cache / "m", source_sha256=SHA) is None


def test_waiting_for_another_build_ends(cache: Path) -> None:
    inside, release = threading.Event(), threading.Event()

    def slow(scratch: Path, model: Path) -> None:
        inside.set()
        release.wait(timeout=30)
        _build(scratch, model)

    thread = threading.Thread(target=ensure_published, args=(cache / "m", slow), kwargs={"source_sha256": SHA})
    thread.start()
    try:
        assert inside.wait(timeout=30)
        with pytest.raises(ModelLoadError, match="another process has been building"):
            ensure_published(cache / "m", _build, source_sha256=SHA, lock_timeout_s=0.05)
    finally:
        release.set()
        thread.join(timeout=30)


def _run_builder(code: str, cache: Path) -> subprocess.Popen[str]:
    program = f"""
import resource, time
from pathlib import Path
from pilotfish.models.store_publish import ensure_published, DiskFull
target = Path({str(cache)!r}) / "m"
{code}
"""
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)


def test_killed_builder_leaves_nothing_that_looks_whole_and_no_lock(cache: Path) -> None:
    code = f"""
def build(scratch, model):
    (model / "weights").write_bytes(b"w" * 1000)
    print("building", flush=True)
    time.sleep(60)
ensure_published(target, build, source_sha256={SHA!r})
"""
    process = _run_builder(code, cache)
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert directory_problem(cache / "m", source_sha256=SHA) == "it is not there"
    assert len(_hidden(cache)) == 1
    ensure_published(cache / "m", _build, source_sha256=SHA, lock_timeout_s=1.0)
    assert directory_problem(cache / "m", source_sha256=SHA) is None
    assert _hidden(cache) == []


def test_full_disk_while_building(cache: Path) -> None:
    """A limit on a file's size stands for the full disk: the same error path, and no root is needed."""
    code = f"""
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
def build(scratch, model):
    with (model / "weights").open("wb") as file:
        while True:
            file.write(b"w" * 4096)
try:
    ensure_published(target, build, source_sha256={SHA!r})
except DiskFull as error:
    print(error)
"""
    process = _run_builder(code, cache)
    output, _ = process.communicate(timeout=30)
    assert "no room in" in output
    assert "PILOTFISH_CACHE" in output
    assert not (cache / "m").exists()
    assert _hidden(cache) == []


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="needs /dev/full")
def test_no_space_left_is_disk_full(cache: Path) -> None:
    def build(_scratch: Path, _model: Path) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"w")

    with pytest.raises(DiskFull, match="No space left on device"):
        ensure_published(cache / "m", build, source_sha256=SHA)


def test_too_little_free_space_is_said_before_writing(cache: Path) -> None:
    cache.mkdir(parents=True)
    with pytest.raises(DiskFull, match=r"1000000000000 MB are needed and \d+ MB are free"):
        require_free_bytes(10**18)


def test_cache_that_cannot_be_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PILOTFISH_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelLoadError, match="set PILOTFISH_CACHE"):
        ensure_published(models_directory() / "m", _build, source_sha256=SHA)
