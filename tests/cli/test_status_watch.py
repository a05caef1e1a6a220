"""`status --watch` as a shell runs it, with a terminal and without one."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys

import pytest
from pilotfish.cli.status_watch import table
from pilotfish.common.cluster_state import ClusterState, ReplicaState, ReplicaStatus, ScalingState
from pilotfish.common.requests import EngineLoad
from small_server import SmallServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    with SmallServer(tmp_path_factory.mktemp("model")) as running:
        yield running


def watch_command(server: SmallServer) -> list[str]:
    command = [sys.executable, "-m", "pilotfish.cli.main", "status", "--address", server.address]
    return [*command, "--watch", "--interval-s", "0.2"]


def test_watch_without_a_terminal_prints_rows_until_interrupted(server: SmallServer) -> None:
    command = watch_command(server)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        heads, *rows = [process.stdout.readline() for _ in range(5)]
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stderr.read() == ""
    assert heads.split()[:3] == ["TIME", "REPLICA", "STATE"]
    assert [row.split()[1] for row in rows] == ["replica-0", "tiny:"] * 2
    assert "ready" in rows[0]


def test_watch_on_a_terminal_draws_over_itself_and_gives_the_cursor_back(server: SmallServer) -> None:
    ours, theirs = pty.openpty()
    command = watch_command(server)
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        seen = b""
        while seen.count(b"\x1b[H") < 4:  # one clears the screen
            seen += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        with contextlib.suppress(OSError):  # the other end is closed: everything was read
            while part := os.read(ours, 4096):
                seen += part
    os.close(ours)
    assert seen.count(b"\x1b[2J") == 1
    assert seen.startswith(b"\x1b[?25l")
    assert seen.rstrip().endswith(b"\x1b[?25h")
    assert seen.count(b"replica-0") >= 3


def test_watch_shows_rates_between_two_looks() -> None:
    def state(**counts: int) -> ClusterState:
        place = ReplicaStatus(
            name="r",
            state=ReplicaState.READY,
            message="",
            address="",
            node="",
            restarts=0,
            info=None,
            load=EngineLoad(num_running=3, num_used_blocks=1, num_cached_blocks=1, num_free_blocks=2),
            last_step_age_s=0.0,
            last_step_id=1,
            num_generated_tokens=counts["num_generated_tokens"],
        )
        return ClusterState(
            version="1",
            model="m",
            replicas=(place,),
            scaling=ScalingState(min_replicas=1, max_replicas=1, num_wanted=1),
            num_queued=4,
            num_running=3,
            generation_config="openai",
            sampling_defaults={},
            grpc_address="",
            http_address="",
            num_requests=1,
            num_restarts=0,
            controller_pid=1,
            **counts,
        )

    before = state(uptime_s=10, num_generated_tokens=100, num_prompt_tokens=100, num_cached_tokens=0)
    after = state(uptime_s=12, num_generated_tokens=150, num_prompt_tokens=200, num_cached_tokens=75)
    summary, _, row = table(after, before)
    assert "4 queued, 3 running, 25.0 tokens/s, cache hits 75 %" in summary
    assert row.split() == ["r", "ready", "3", "0", "25", "%", "25.0", "0"]
    assert "cache hits 38 %" in table(after, after)[0]
    assert "0.0 tokens/s" in table(before, after)[0], "another controller's counts are lower"
