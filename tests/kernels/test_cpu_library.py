"""Building and loading the C++ kernels, with a real compiler on small sources."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from pilotfish.kernels.cpu import library
from pilotfish.kernels.cpu.threads import use_threads
from pilotfish.kernels.linear import linear

SOURCE = 'extern "C" __attribute__((visibility("default"))) void pilotfish_nothing() {}\n'


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder with one tiny source in place of the real ones."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "tiny.cpp").write_text(SOURCE)
    monkeypatch.setattr(library, "SOURCE_DIR", folder)
    return folder


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def test_builds_once(sources, tmp_path, monkeypatch):
    path = library.build(tmp_path / "cache")
    assert [path] == list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(library, "find_compiler", lambda: pytest.fail("compiled again"))
    assert library.build(tmp_path / "cache") == path


def test_a_changed_source_or_header_is_built_anew(sources, tmp_path):
    first = library.build(tmp_path)
    (sources / "tiny.cpp").write_text(SOURCE + "// changed\n")
    second = library.build(tmp_path)
    (sources / "more.h").write_text("// a header\n")
    assert len({first, second, library.build(tmp_path)}) == 3


def test_builders_may_race_and_one_compiles(sources, tmp_path, monkeypatch):
    run, commands = library._run, []
    monkeypatch.setattr(library, "_run", lambda command: (commands.append(command), run(command)))
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: library.build(tmp_path / "cache"), range(4)))
    assert set(paths) == set((tmp_path / "cache").iterdir())
    assert len(set(paths)) == 1
    assert len(commands) == len(list(sources.glob("*.cpp"))) + 1


def test_a_compiler_error_is_told_and_leaves_nothing(sources, tmp_path):
    (sources / "broken.cpp").write_text("#error this does not compile\n")
    with pytest.raises(library.BuildError, match="this does not compile"):
        library.build(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_missing_compiler_names_what_to_install(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(library.BuildError, match=r"tried no-such-compiler.*apt install g\+\+"):
        library.build(tmp_path)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(library.BuildError, match=r"tried g\+\+, c\+\+, clang\+\+"):
        library.build(tmp_path)


def test_a_compiler_that_hangs_is_stopped(sources, tmp_path, monkeypatch):
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setattr(library, "BUILD_TIMEOUT_S", 0.1)
    with pytest.raises(library.BuildError, match="took more than"):
        library.build(tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_told(sources, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(library.BuildError, match="set PILOTFISH_CACHE"):
        library.build(tmp_path / "file" / "cache")


def test_without_a_compiler_ops_run_references_after_one_warning(tmp_path):
    code = """
import logging, torch
logging.basicConfig(level=logging.WARNING)
from pilotfish.kernels.cpu import library
from pilotfish.kernels.linear import linear
from pilotfish.kernels.dispatch import backend_report
from pilotfish.kernels.linear import linear
for _ in range(3):
    print(linear(torch.ones(2, 3), torch.ones(4, 3, dtype=torch.bfloat16)).sum().item())
assert library.load() is None
print(backend_report()["cpu"])
"""
    done = run_python(code, CXX="no-such-compiler", PILOTFISH_CACHE=str(tmp_path))
    assert done.stdout.splitlines()[:3] == ["24.0"] * 3
    assert "no-such-compiler" in done.stdout.splitlines()[3]
    assert done.stderr.count("WARNING") == 1
    assert "apt install g++" in done.stderr


def test_threads_of_a_process_may_call_at_the_same_time():
    x, weight = torch.randn(5, 300), torch.randn(700, 300)
    expected = linear(x, weight)
    with ThreadPoolExecutor(4, initializer=use_threads, initargs=(3,)) as pool:
        assert all(torch.equal(y, expected) for y in pool.map(lambda _: linear(x, weight), range(400)))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads there")
def test_a_forked_process_gets_helper_threads_of_its_own():
    code = """
import os, torch
from pilotfish.kernels.linear import linear
torch.set_num_threads(3)
x, weight = torch.randn(64, 300), torch.randn(2000, 300)
expected = linear(x, weight)
child = os.fork()
if child == 0:
    before = len(os.listdir("/proc/self/task"))
    results = [linear(x, weight) for _ in range(50)]
    num_started = len(os.listdir("/proc/self/task")) - before
    os._exit(0 if num_started == 2 and all(torch.equal(y, expected) for y in results) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_python(code).stdout == "0\n"
