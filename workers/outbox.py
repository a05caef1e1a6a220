"""Steps that the controller has not acknowledged, in order, bounded in bytes.

A step is appended when the engine made it and leaves when the controller acknowledges it; in between it can be sent again.
Nothing is ever dropped to make room: `is_full` tells the server to end what produces more (see server.py).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from ..proto import worker_pb2


@dataclass(frozen=True, slots=True)
class OutboxEntry:
    """A step as it travels; `finished` are the requests whose last output it carries."""

    step_id: int
    message: worker_pb2.WorkerMessage
    num_bytes: int
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

    def append(self, step: worker_pb2.Step, finished: tuple[str, ...]) -> None:
        assert step.step_id > self.last_step_id, f"step {step.step_id} after step {self.last_step_id}"
        entry = OutboxEntry(step.step_id, worker_pb2.WorkerMessage(step=step), step.ByteSize(), finished)
        self._entries.append(entry)
        self.num_bytes += entry.num_bytes
        self.last_step_id = entry.step_id

    def acknowledge(self, step_id: int) -> list[str]:
        """Forget the steps up to `step_id`; returns the requests that ended in them."""
        finished: list[str] = []
        while self._entries and self._entries[0].step_id <= step_id:
            entry = self._entries.popleft()
            self._first_position += 1
            self.num_bytes -= entry.num_bytes
            finished.extend(entry.finished)
        return finished

    def at(self, position: int) -> OutboxEntry | None:
        """The entry at a position; None past the newest. An acknowledged position is an error of the caller."""
        index = position - self._first_position
        assert index >= 0, f"position {position} was acknowledged already"
        return self._entries[index] if index < len(self._entries) else None
