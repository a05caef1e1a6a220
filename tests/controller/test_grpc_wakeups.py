"""The event loop takes grpc.aio's wake-ups all at once; a grpcio that wakes it in another way fails here."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import subprocess
import sys

import grpc
from pilotfish.controller import grpc_wakeups


class PollerCompletionQueue:
    """Takes its queue as grpc.aio's does: one byte, then all there is."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.num_calls = 0

    def wake(self, num_bytes: int) -> None:
        self.theirs.sendall(b"1" * num_bytes)

    def _handle_events(self, _loop: object) -> None:
        self.ours.recv(1)
        self.num_calls += 1


async def test_hundreds_of_wakeups_take_a_few_rounds() -> None:
    loop = asyncio.get_running_loop()
    grpc_wakeups.take_all_at_once(loop)
    queue = PollerCompletionQueue()
    with queue.ours, queue.theirs:
        loop.add_reader(queue.ours, functools.partial(queue._handle_events, loop))
        queue.wake(1)
        while not queue.num_calls:
            await asyncio.sleep(0)
        queue.wake(200)
        for _ in range(30):  # rounds of the loop
            await asyncio.sleep(0)
        loop.remove_reader(queue.ours)
        queue.ours.setblocking(False)
        try:
            left = queue.ours.recv(1000)
        except BlockingIOError:
            left = b""
    assert not left
    assert queue.num_calls <= 3


def test_grpc_aio_wakes_a_loop_in_the_way_that_is_known() -> None:
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        grpc_wakeups.take_all_at_once(loop)

        async def use() -> list[object]:
            async with grpc.aio.insecure_channel("127.0.0.1:1"):
                readers = [key.data[0]._callback for key in loop._selector.get_map().values() if key.data[0]]
                return [getattr(reader, "func", None) for reader in readers]

        assert grpc_wakeups._take in runner.run(use())


def test_ray_gives_an_actor_asyncios_own_loop_where_uvloop_is_installed(tmp_path) -> None:
    (tmp_path / "uvloop.py").write_text("def new_event_loop(): return 'another'\n")
    program = (
        "import os; from pilotfish.controller import grpc_wakeups; from ray._private.async_compat import get_new_event_loop\n"
        "assert get_new_event_loop() == 'another'\n"
        "os.environ |= grpc_wakeups.ray_environment()\n"
        "grpc_wakeups.logger.warning = lambda *_: 1 / 0\n"
        "grpc_wakeups.take_all_at_once(get_new_event_loop())\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    environment.pop("RAY_USE_UVLOOP", None)
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)


def test_without_uvloop_an_actor_needs_no_variables(monkeypatch) -> None:
    monkeypatch.setattr(grpc_wakeups, "find_spec", lambda _: None)
    assert grpc_wakeups.ray_environment() == {}
