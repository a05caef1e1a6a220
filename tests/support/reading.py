"""Reading a request's events the way a client would, and checking their order on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from pilotfish.common.requests import FinishReason
from pilotfish.controller.events import Delta, Event, Started, Usage
from pilotfish.controller.service import RequestHandle


@dataclass
class Choice:
    """What one choice has said so far; a repeated or missing token fails."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str = ""

    def add(self, delta: Delta) -> None:
        content = delta.content
        assert self.finish_reason is None, "a delta after the last one"
        assert not content.token_ids or content.offset == len(self.token_ids)
        self.token_ids.extend(content.token_ids)
        self.text += content.text
        self.finish_reason, self.stop_reason = content.finish_reason, content.stop_reason


@dataclass
class Answer:
    """A request's events put together."""

    started: Started | None = None
    choices: dict[int, Choice] = field(default_factory=dict)
    usage: Usage | None = None
    num_deltas: int = 0

    def add(self, event: Event) -> None:
        assert self.usage is None, "an event after the last one"
        if isinstance(event, Started):
            assert self.started is None
            self.started = event
        elif isinstance(event, Delta):
            assert self.started is not None
            self.num_deltas += 1
            self.choices.setdefault(event.index, Choice()).add(event)
        else:
            self.usage = event


async def read(handle: RequestHandle, *, into: Answer | None = None) -> Answer:
    """All events to the end; what came before an error stays in `into`."""
    answer = into if into is not None else Answer()
    async with asyncio.timeout(60), handle:
        async for event in handle:
            answer.add(event)
    assert answer.usage is not None
    assert all(choice.finish_reason is not None for choice in answer.choices.values())
    return answer


async def read_until(handle: RequestHandle, answer: Answer, done: Callable[[Answer], bool]) -> None:
    async with asyncio.timeout(60):
        while not done(answer):
            answer.add(await anext(handle))


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)
