"""What the fleet needs of whoever starts worker processes: Ray (ray_launcher.py), or a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ..common.config import ModelConfig
from ..common.rank_place import LEADER
from ..common.requests import ServingWorker


def worker_name(replica: str, *, epoch: int, rank: int = LEADER) -> str:
    """Of a rank's worker: its name in its certificate, and its actor's."""
    return f"{replica}.{epoch}.{rank}"


class WorkerDied(Exception):
    """A worker process ended before it was ready, without saying why; the message has what is known."""


class Misplaced(Exception):
    """No worker was started where it was to be; a next launch places it elsewhere. The message says what is wrong there."""


class NoRoom(Exception):
    """The cluster has nowhere to start a worker now; the message says what is missing."""


class WorkerProcess(Protocol):
    """A replica's worker, or its ranks."""

    @property
    def places(self) -> Sequence[ServingWorker]:
        """Where it takes requests: at one address, or at one a data rank. They live and end together."""

    async def wait_dead(self) -> str:
        """Returns when the process has ended, with what is known of the cause."""

    async def wait_notice(self) -> float:
        """Returns when it is known that a machine of the replica will go away, with the seconds until then."""

    async def has_lost_machine(self) -> bool:
        """Whether a machine of the replica has gone or is about to: then its end says nothing of the requests there."""

    async def end(self) -> None:
        """Kill the process if it lives."""


class Launcher(Protocol):
    """Starts worker processes, and finds those that an earlier controller started."""

    async def launch(self, replica: str, *, epoch: int, model: ModelConfig, on_wait: Callable[[str], None]) -> WorkerProcess:
        """Start a worker of a model and wait until it serves. A cancelled launch leaves no process behind.

        `on_wait` is told what the launch waits for before it can begin, from time to time, and "" once it has begun.

        Raises:
            PilotfishError: it cannot start, and why.
            WorkerDied: its process ended.
            NoRoom, Misplaced: it was not started.
        """

    async def find(self) -> Mapping[str, WorkerProcess]:
        """Living workers by replica name; the newest of each, and older ones are ended."""
