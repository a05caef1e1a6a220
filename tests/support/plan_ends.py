"""Ends of a plan channel in processes of their own; each says what happened through a pipe."""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

from pilotfish.common.errors import PilotfishError
from pilotfish.common.identity import Identity
from pilotfish.workers import plan_channel
from pilotfish.workers.plan_channel import Reader, Writer
from pilotfish.workers.plan_stream import PlanFollower
from processes import preloaded_processes

PATIENCE_S = 60.0


def read_all(pipe: Connection, name: str, epoch: int, index: int, delay_s: float) -> None:
    """Tells the length and CRC of each message, then the error that ended it."""
    reader = Reader(name, epoch=epoch, index=index, timeout_s=PATIENCE_S)
    pipe.send("here")
    try:
        while True:
            time.sleep(delay_s)
            message = reader.receive(PATIENCE_S)
            assert message is not None
            pipe.send((len(message), zlib.crc32(message)))
    except PilotfishError as error:
        pipe.send(error.message)
    reader.close()


def answer(pipe: Connection, name: str, epoch: int, num_slots: int, slot_bytes: int, num_messages: int) -> None:
    """Sends each message back through a channel of its own, and looks only when it is woken."""
    plan_channel._LIVENESS_INTERVAL_S, plan_channel._DOZE_AFTER_MESSAGE_S = PATIENCE_S, 0.0
    rng = random.Random(1)
    writer = Writer(f"{name}-back", epoch=epoch, readers=["leader"], num_slots=num_slots, slot_bytes=slot_bytes)
    writer.wait_for_readers(PATIENCE_S)
    reader = Reader(name, epoch=epoch, index=0, timeout_s=PATIENCE_S)
    for _ in range(num_messages):
        message = reader.receive(PATIENCE_S)
        assert message is not None
        pause(rng)
        writer.send(message, PATIENCE_S)
    pipe.send("done")
    pipe.poll(PATIENCE_S)


def pause(rng: random.Random) -> None:
    """Mostly none, else up to 0.3 ms, busy: a sleep would last longer than what it is to meet."""
    end_s = time.monotonic() + rng.choice((0.0, 0.0, rng.random() * 3e-4))
    while time.monotonic() < end_s:
        pass


@contextmanager
def woken() -> Iterator[None]:
    """What waits in it for up to PATIENCE_S does not wait until its time is over."""
    start_s = time.monotonic()
    yield
    assert time.monotonic() - start_s < PATIENCE_S / 2, "it was not woken"


def write_and_wait(pipe: Connection, name: str, epoch: int) -> None:
    """Sends one message, and keeps the channel open."""
    writer = Writer(name, epoch=epoch, readers=["rank 1"])
    writer.wait_for_readers(PATIENCE_S)
    writer.send(b"one", PATIENCE_S)
    pipe.send("sent")
    pipe.poll(PATIENCE_S)


def follow_all(pipe: Connection, address: str, epoch: int, follower: str, leader: str, identity: Identity) -> None:
    """As `read_all`, over gRPC."""
    plans = PlanFollower(address, epoch=epoch, follower=follower, leader=leader, identity=identity, timeout_s=PATIENCE_S)
    pipe.send("here")
    try:
        while True:
            message = plans.receive(PATIENCE_S)
            assert message is not None
            pipe.send((len(message), zlib.crc32(message)))
    except PilotfishError as error:
        pipe.send(error.message)
    plans.close()


@contextmanager
def process(target: Callable[..., None], *args: object) -> Iterator[tuple[ForkServerProcess, Connection]]:
    """Runs the function in a process with one end of a pipe; ended with the block, whatever happens in it."""
    context = preloaded_processes()
    ours, theirs = context.Pipe()
    child = context.Process(target=target, args=(theirs, *args), daemon=True)
    child.start()
    theirs.close()
    try:
        yield child, ours
    finally:
        child.kill()
        child.join(PATIENCE_S)
        ours.close()


def hear(pipe: Connection) -> object:
    assert pipe.poll(PATIENCE_S), "the other process is silent"
    return pipe.recv()
