"""Readers of streams woken in turn, a few in each round of the event loop.

A step brings tokens for a hundred streams, and each costs more to send than to take in. Were all of them woken at once, a busy
controller would send for so long that the next steps, requests and aborts wait behind it. With a few in each round they come
in between; and while a reader waits for its turn, what its stream gets is joined into one delta. So the busier the controller,
the fewer and larger its messages.

Who sends to a client is not woken, but called: first all of a round make their messages, then all send them. What is done for
one after the other is in the processor's caches from the second one on.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Protocol

_WAKES_A_ROUND = 32


class Sender(Protocol):
    """Must not raise."""

    def prepare(self) -> bool:
        """It is its turn: whether there is something to send, which it makes now."""

    def send(self) -> None:
        """What it has prepared."""

    def settle(self) -> None:
        """Two rounds later: what was sent may be forgotten, if it has left. After one the loop has not heard of it yet."""


class Turn:
    """An event for one reader that is set a little later than `set` is called: in its turn. Set again before that, it keeps its
    place.

    Attributes:
        sender: called in its turn.
    """

    __slots__ = ("_has_come", "_outlet", "_waiter", "sender")

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet
        self._has_come = False
        self._waiter: asyncio.Future[None] | None = None
        self.sender: Sender | None = None

    def set(self) -> None:
        self._outlet.queue(self)

    def come(self) -> None:
        """It is its turn."""
        self._has_come = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def clear(self) -> None:
        self._has_come = False

    async def wait(self) -> None:
        if not self._has_come:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter


class Outlet:
    """The turns of one event loop."""

    def __init__(self) -> None:
        self._due: dict[Turn, None] = {}
        self._sent: list[Sender] = []
        self._settling: list[Sender] = []

    def turn(self) -> Turn:
        """One for a new reader, which need not wait for its first."""
        turn = Turn(self)
        turn.come()
        return turn

    def queue(self, turn: Turn) -> None:
        if not self._due:
            asyncio.get_running_loop().call_soon(self._round)
        self._due[turn] = None

    def _round(self) -> None:
        for sender in self._settling:
            sender.settle()
        self._settling, self._sent = self._sent, []
        for turn in list(itertools.islice(self._due, _WAKES_A_ROUND)):
            del self._due[turn]
            turn.come()
            if turn.sender is not None and turn.sender.prepare():
                self._sent.append(turn.sender)
        for sender in self._sent:
            sender.send()
        if self._due:
            asyncio.get_running_loop().call_soon(self._round)
