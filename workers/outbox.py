"""Steps that the controller has not acknowledged, in order, bounded in bytes; encoded once, however often they are sent.

A step is appended when the engine made it and leaves when the controller acknowledges it; in between it can be sent again.
Nothing is ever dropped to make room: `is_full` tells the server to end what produces more (see server.py).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice

from ..common.requests import StepOutput
from ..proto import worker_pb2
from ..proto.codec import fill_step

_MAX_JOINED_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class OutboxEntry:
    """A step as it travels: `data` is a WorkerMessage. `finished` are the requests whose last output it carries."""

    step_id: int
    data: bytes
    finished: tuple[str, ...]


class StepOutbox:
    """Positions count all entries ever appended, so that a sender's place stays right while acknowledged ones leave."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: deque[OutboxEntry] = deque()
        self._first_position = 0
        self.num_bytes = 0
        self.last_step_id = 0

    @property
    def is_full(self) -> bool:
        return self.num_bytes >= self._max_bytes

    @property
    def first_position(self) -> int:
        return self._first_position

    def append(self, step: StepOutput, finished: tuple[str, ...]) -> None:
        assert step.step_id > self.last_step_id, f"step {step.step_id} after step {self.last_step_id}"
        entry = OutboxEntry(step.step_id, step_message(step), finished)
        self._entries.append(entry)
        self.num_bytes += len(entry.data)
        self.last_step_id = entry.step_id

    def acknowledge(self, step_id: int) -> list[str]:
        """Forget the steps up to `step_id`; returns the requests that ended in them."""
        finished: list[str] = []
        while self._entries and self._entries[0].step_id <= step_id:
            entry = self._entries.popleft()
            self._first_position += 1
            self.num_bytes -= len(entry.data)
            finished.extend(entry.finished)
        return finished

    def message_from(self, position: int) -> tuple[bytes, int]:
        """A message with the steps from a position on, as many as go together, and how many; an empty one past the newest.

        A message costs more than what is in it: a link that is slower than the steps gets fewer and larger ones. An
        acknowledged position is an error of the caller.
        """
        begin = position - self._first_position
        assert begin >= 0, f"position {position} was acknowledged already"
        parts: list[bytes] = []
        num_bytes = 0
        for entry in islice(self._entries, begin, None):
            num_bytes += len(entry.data)
            if parts and num_bytes > _MAX_JOINED_BYTES:
                break
            parts.append(entry.data)
        return b"".join(parts), len(parts)  # messages of repeated fields, one behind the other, are a message


def step_message(step: StepOutput) -> bytes:
    """A WorkerMessage."""
    message = worker_pb2.WorkerMessage()
    fill_step(message.steps.add(), step)
    return message.SerializeToString()
