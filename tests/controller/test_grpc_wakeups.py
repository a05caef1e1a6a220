"""The event loop takes grpc.aio's wake-ups all at once; a grpcio that wakes it in another way fails here."""

from __future__ import annotations

import asyncio
import functools
import socket

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
