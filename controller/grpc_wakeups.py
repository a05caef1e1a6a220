"""grpc.aio's wake-ups of the event loop, taken all at once.

grpc.aio's own thread puts what has happened in a queue and then writes a byte to a socket. The event loop reads one byte and
takes the whole queue; so in a busy process bytes are left behind, until the socket is full and that thread waits. From there on
one thing that has happened costs one round of the loop, and what came in last waits for hundreds of rounds: a worker's message
for 48 ms, with 500 streams at 10,000 messages a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import logging
import socket
import sys
import termios
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

logger = logging.getLogger(__name__)

_QUEUE = "PollerCompletionQueue"


def ray_environment() -> dict[str, str]:
    """Variables for a Ray actor on whose event loop grpc.aio is used: Ray takes uvloop's where it is installed.

    None where it is not: an actor with variables starts a second later.
    """
    return {"RAY_USE_UVLOOP": "0"} if find_spec("uvloop") is not None else {}


def take_all_at_once(loop: asyncio.AbstractEventLoop) -> None:
    """To be called before grpc.aio is used on the loop, in a process in which no other loop uses it: they share the socket."""
    if not isinstance(loop, asyncio.SelectorEventLoop):
        logger.warning("the event loop is %s: under load grpc.aio will be slow on it", type(loop).__name__)
        return
    add_reader = loop.add_reader

    def add(fd: Any, callback: Callable[..., Any], *args: Any) -> Any:
        is_queue = isinstance(callback, functools.partial) and type(getattr(callback.func, "__self__", None)).__name__ == _QUEUE
        if is_queue and isinstance(fd, socket.socket):
            callback = functools.partial(_take, fd, callback)
        return add_reader(fd, callback, *args)

    loop.add_reader = add  # type: ignore[method-assign, assignment]


def _take(wakeups: socket.socket, take_queue: Callable[[], None]) -> None:
    num_bytes = int.from_bytes(fcntl.ioctl(wakeups.fileno(), termios.FIONREAD, b"\0\0\0\0"), sys.byteorder)
    if num_bytes > 1:
        with contextlib.suppress(BlockingIOError):  # another loop was quicker
            wakeups.recv(num_bytes - 1, socket.MSG_DONTWAIT)
    take_queue()  # reads the last one, and would wait for one
