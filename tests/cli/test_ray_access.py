"""A real Ray cluster that asks for a token: who has it gets in, and who has not is told what to do, at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pilotfish.cli.ray_access import check_access
from pilotfish.common.errors import Unavailable
from pilotfish.controller.ports import hold

pytestmark = pytest.mark.cluster
TOKEN, OTHER_TOKEN = "5" * 64, "6" * 64
BIN = Path(sys.executable).parent
LIMIT_S = 60.0


@dataclass
class GuardedRay:
    """`address` asks for TOKEN; `home` has it in .ray/auth_token."""

    address: str
    home: Path


@pytest.fixture(scope="module")
def guarded() -> Iterator[GuardedRay]:
    directory = Path(tempfile.mkdtemp(prefix="pf-ray-", dir="/tmp"))  # short: Ray puts sockets there
    home = directory / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray/auth_token").write_text(TOKEN)
    ports = [free_port() for _ in range(2)]
    command = [BIN / "ray", "start", "--head", "--block", "--include-dashboard=false", "--disable-usage-stats", "--num-cpus=1"]
    command += [f"--port={ports[0]}", f"--ray-client-server-port={ports[1]}", f"--temp-dir={directory / 'ray'}"]
    environment = os.environ | {"HOME": str(home), "RAY_AUTH_MODE": "token"}
    with (directory / "log").open("w") as log:
        process = subprocess.Popen([*command, "--object-store-memory=80000000"], stdout=log, stderr=log, env=environment)
    try:
        address = f"{own_address()}:{ports[0]}"
        wait_for(address, process, directory / "log")
        yield GuardedRay(address, home)
    finally:
        process.terminate()
        process.wait(LIMIT_S)
        shutil.rmtree(directory, ignore_errors=True)


def free_port() -> int:
    with hold("127.0.0.1", 0, flag="") as server:
        return int(server.getsockname()[1])


def own_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + LIMIT_S
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"no Ray at {host}:{port}: {log.read_text()}"
        time.sleep(0.1)


@pytest.fixture(autouse=True)
def no_token_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_who_has_no_token_is_told_where_it_is_missing(guarded: GuardedRay, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"asks for a token, and there is none in .*\.ray/auth_token\. Run .* or copy"):
        check_access(guarded.address, was_found=False)


def test_a_wrong_token_is_named_by_its_place(guarded: GuardedRay, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", OTHER_TOKEN)
    with pytest.raises(Unavailable, match="the one in RAY_AUTH_TOKEN is not its"):
        check_access(guarded.address, was_found=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / "token").write_text(OTHER_TOKEN)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(Unavailable, match=r"the one in .*/token is not its") as refusal:
        check_access(guarded.address, was_found=True)
    assert OTHER_TOKEN not in str(refusal.value)


def test_a_token_that_would_not_be_sent_is_no_token(guarded: GuardedRay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(guarded.home))
    check_access(guarded.address, was_found=True)
    with pytest.raises(Unavailable, match=r"set RAY_AUTH_MODE=token \(it is unset\)"):
        check_access(guarded.address, was_found=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    check_access(guarded.address, was_found=False)


def test_the_commands_get_in_with_the_token_and_say_what_is_missing_without(guarded: GuardedRay, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pilotfish.cli.main", "down", "--ray-address", guarded.address]
    with_token = os.environ | {"HOME": str(guarded.home), "RAY_AUTH_MODE": "token"}
    done = subprocess.run(command, env=with_token, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "Nothing is served" in done.stdout + done.stderr
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode != 0
    assert "asks for a token" in done.stderr


def test_nobody_there() -> None:
    with pytest.raises(Unavailable, match="nobody answers at 127"):
        check_access(f"127.0.0.1:{free_port()}", was_found=False)
