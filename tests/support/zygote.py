"""Child processes that start in milliseconds, forked from one that has imported what they need, and die with the test.

However the test's process ends, the zygote ends with it, and every child with the zygote (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import os
import pickle
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_START_S = 120.0


class Child:
    """A process, known by a descriptor: a number that the system has given to another is never meant."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptor = os.pidfd_open(pid)
        self._is_gone = False

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def stop(self) -> None:
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        self._send(signal.SIGCONT)

    @property
    def has_ended(self) -> bool:
        return self._has_ended_within(0)

    async def wait(self) -> None:
        """Until it has ended."""
        if self.has_ended:
            return
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        watched = os.dup(self._descriptor)  # a loop watches a descriptor once
        loop.add_reader(watched, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(watched)
            os.close(watched)

    def end(self) -> None:
        """Kills it if it lives; returns when it has ended."""
        self.kill()
        assert self._has_ended_within(10)

    def _has_ended_within(self, timeout_s: float) -> bool:
        if not self._is_gone and select.select([self._descriptor], [], [], timeout_s)[0]:
            self._is_gone = True
            os.close(self._descriptor)
        return self._is_gone

    def _send(self, number: int) -> None:
        if not self.has_ended:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)


class Zygote:
    """See the module. `modules` are imported once."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},  # as workers under Ray: idle threads of OpenMP must not spin
        )
        self._send((sys.path, list(modules)))
        assert self._receive() == "ready"

    def fork(self, function: str, *arguments: Any, log: Path) -> Child:
        """Runs "module:function" in a process of its own, which writes to `log`."""
        self._send((function, arguments, log))
        return Child(self._receive())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(pickle.dumps(message))

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        assert select.select([self._process.stdout], [], [], _START_S)[0], f"the zygote said nothing for {_START_S:g} s"
        return pickle.load(self._process.stdout)


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended meanwhile
        os._exit(1)


def _serve(parent: int) -> None:
    _die_with(parent)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for children here
    sys.path[:], modules = pickle.load(sys.stdin.buffer)
    for name in modules:
        importlib.import_module(name)
    _answer("ready")
    while True:
        try:
            function, arguments, log = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        own = os.getpid()
        if pid := os.fork():
            _answer(pid)
            continue
        _run_child(own, function, arguments, log)


def _answer(message: object) -> None:
    os.write(1, pickle.dumps(message))


def _run_child(parent: int, function: str, arguments: tuple[Any, ...], log: Path) -> None:
    code = 1
    try:
        _die_with(parent)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY), 1)
        os.dup2(1, 2)
        module, _, name = function.partition(":")
        getattr(importlib.import_module(module), name)(*arguments)
        code = 0
    except BaseException:  # noqa: BLE001 - a process's edge
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
