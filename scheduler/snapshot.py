"""What an engine's scheduler holds at one moment, for a controller that starts anew or has missed events."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.requests import BlockStored


@dataclass(frozen=True, slots=True)
class RunningRequest:
    """A request that has not ended, running or waiting."""

    request_id: str
    num_prompt_tokens: int
    output_token_ids: tuple[int, ...]

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)


@dataclass(frozen=True, slots=True)
class SchedulerSnapshot:
    """`blocks` is the prefix index, parents before children, after all events with ids below `next_event_id`."""

    requests: tuple[RunningRequest, ...]
    blocks: tuple[BlockStored, ...]
    next_event_id: int
