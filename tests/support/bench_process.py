"""`pilotfish bench latency` with ranks in a process of its own, to be hurt while it runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

START_S = 180.0


class BenchProcess:
    """Runs two ranks within its `with` block; entered, they are decoding."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "pilotfish.cli.main", "bench", "latency", "--tensor-parallel", "2", *arguments]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self._lines: list[str] = []
        self._is_warming_up = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> BenchProcess:
        self._reader.start()
        assert self._is_warming_up.wait(START_S), self.said
        assert self._process.poll() is None, self.said
        time.sleep(0.6)  # for first steps, and for a first beat
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()

    @property
    def said(self) -> str:
        return "".join(self._lines)

    @property
    def follower(self) -> int:
        """The pid of rank 1."""
        children = subprocess.run(
            ["pgrep", "-P", str(self._process.pid), "-f", "spawn_main"], capture_output=True, text=True, check=True
        )
        (pid,) = map(int, children.stdout.split())
        return pid

    def interrupt(self) -> None:
        """As Ctrl-C does: both processes."""
        os.killpg(self._process.pid, signal.SIGINT)

    def wait(self, timeout_s: float) -> int:
        """Its exit code."""
        return self._process.wait(timeout_s)

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line)
            if "warm-up" in line:
                self._is_warming_up.set()
        self._is_warming_up.set()


def has_ended(pid: int, *, timeout_s: float) -> bool:
    """Whether the process is gone, or a zombie, within that time."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False
