"""A stream's events to its gRPC call, in the turns of its reader.

A task that waits for events, writes them and waits until they are written is woken twice for each message, through all that it
awaits. Here it waits once, for the end, and what comes before is written in the reader's turns: `context.write` is begun in one
round of the outlet and ended in a later one, when grpc.aio is done with the message.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from ..text.tokenizer import Tokenizer
from . import grpc_messages
from .events import Event
from .grpc_guard import Context
from .streams import StreamReader


class CallWriter:
    """An outlet.Sender. Life: `await run()`, once for each call; nothing else writes to the call meanwhile."""

    __slots__ = ("_context", "_last", "_message", "_reader", "_tokenizer", "_write", "_written")

    def __init__(self, context: Context, reader: StreamReader, tokenizer: Tokenizer) -> None:
        self._context = context
        self._reader = reader
        self._tokenizer = tokenizer
        self._last: asyncio.Future[list[Event]] = asyncio.get_running_loop().create_future()
        self._message = b""
        self._write: Coroutine[Any, Any, None] | None = None
        self._written: asyncio.Future[None] | None = None

    async def run(self) -> None:
        """Until all is written; raises the stream's error then."""
        turn = self._reader.wake
        turn.sender = self
        try:
            if self.prepare():
                self.send()
            last = await self._last
        finally:
            turn.sender = None
            self._give_up()
        if last:
            await self._context.write(self._serialize(last))
        self._reader.take()

    def prepare(self) -> bool:
        try:
            self.settle()
            if self._last.done():
                return False
            if self._written is not None:  # the client is slow: what comes meanwhile is joined
                self._written.remove_done_callback(self._come_back)
                self._written.add_done_callback(self._come_back)
                return False
            events = self._reader.take()
            if self._reader.has_all:
                self._last.set_result(events)
                return False
            if events:
                self._message = self._serialize(events)
            return bool(events)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - `run` raises it
            self._fail(error)
            return False

    def send(self) -> None:
        try:
            self._write = self._context.write(self._message)
            self._go_on()
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - `run` raises it
            self._fail(error)

    def settle(self) -> None:
        if self._written is not None and self._written.done():
            try:
                self._go_on()
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - `run` raises it
                self._fail(error)

    def _go_on(self) -> None:
        """As a task would, to the next thing that the write waits for, or its end."""
        write, self._write, self._written = self._write, None, None
        assert write is not None
        try:
            self._written = write.send(None)
            self._write = write
        except StopIteration:
            pass

    def _come_back(self, _written: asyncio.Future[None]) -> None:
        self._reader.wake.set()

    def _fail(self, error: BaseException) -> None:
        if not self._last.done():
            self._last.set_exception(error)

    def _give_up(self) -> None:
        """A write that is under way ends as that of a cancelled task would; nobody hears of what went wrong with it."""
        for future in (self._last, self._written):
            if future is not None and not future.cancel() and not future.cancelled():
                future.exception()
        if self._write is not None:
            self._write.close()

    def _serialize(self, events: list[Event]) -> bytes:
        return grpc_messages.events_to_proto(events, self._tokenizer).SerializeToString()
