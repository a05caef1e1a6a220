"""One replica's life, as a table, and what is known of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from ..common.cluster_state import ReplicaState, ReplicaStatus
from ..common.config import ModelConfig
from ..common.errors import PilotfishError
from ..common.requests import EngineLoad, ServingWorker, WorkerInfo
from .worker_link import WorkerLink


class Happening(StrEnum):
    """What moves a replica from state to state."""

    STARTED = "started"  # its worker runs and is connected
    DRAIN = "drain"  # it is to end when its requests have
    DIED = "died"  # its process ended, fell silent or makes no progress
    RESTART = "restart"  # a new worker is started in its place
    REFUSED = "refused"  # it cannot start, and trying again would not help


TRANSITIONS: dict[tuple[ReplicaState, Happening], ReplicaState] = {
    (ReplicaState.STARTING, Happening.STARTED): ReplicaState.READY,
    (ReplicaState.STARTING, Happening.DIED): ReplicaState.LOST,
    (ReplicaState.STARTING, Happening.REFUSED): ReplicaState.FAILED,
    (ReplicaState.READY, Happening.DRAIN): ReplicaState.DRAINING,
    (ReplicaState.READY, Happening.DIED): ReplicaState.LOST,
    (ReplicaState.DRAINING, Happening.DIED): ReplicaState.LOST,
    (ReplicaState.LOST, Happening.RESTART): ReplicaState.STARTING,
    (ReplicaState.LOST, Happening.REFUSED): ReplicaState.FAILED,
}


@dataclass(slots=True)
class Place:
    """Where a replica takes requests: it has one, or one a data rank, which the dispatcher and the router know by `name`.

    `link` is None while nothing is connected there.
    """

    name: str
    serving: ServingWorker
    link: WorkerLink | None


@dataclass(kw_only=True, slots=True)
class Replica:
    """A replica and its current worker, or its last one: `places`. `failures` counts losses in a row without a completed step
    between them.

    It is of one `model` for its life. `error` says why it is FAILED; `has_served`: a worker of it has started; `settled` is set
    once it was ready or FAILED, or has gone. `leaving` is set when it is to go, for `leave_reason`. Until `serve_until` of the
    monotonic clock it takes requests if no other replica does; its streams may end there until `leave_by`. `on_move` is told
    of every change of state or places.
    """

    name: str
    model: ModelConfig
    state: ReplicaState = ReplicaState.STARTING
    message: str = ""
    places: tuple[Place, ...] = ()
    restarts: int = 0
    failures: int = 0
    has_served: bool = False
    error: PilotfishError | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    leave_reason: str = ""
    serve_until: float = 0.0
    leave_by: float = 0.0
    on_move: Callable[[], None]

    def move(self, happening: Happening, message: str = "") -> None:
        """Follow the table; what it does not have is a defect."""
        self.state = TRANSITIONS[self.state, happening]
        self.message = message
        self.on_move()

    @property
    def info(self) -> WorkerInfo | None:
        """The facts of its first place, None before its worker first started."""
        return self.places[0].serving.info if self.places else None

    def statuses(self) -> tuple[ReplicaStatus, ...]:
        """Of every place; of the replica alone before its worker first started."""
        return tuple(map(self._status, self.places)) or (self._status(None),)

    def _status(self, place: Place | None) -> ReplicaStatus:
        link = place.link if place else None
        return ReplicaStatus(
            name=place.name if place else self.name,
            state=self.state,
            message=self.message,
            address=place.serving.address if place else "",
            node=place.serving.node if place else "",
            restarts=self.restarts,
            info=place.serving.info if place else None,
            load=link.load if link else EngineLoad(),
            last_step_age_s=link.step_age_s if link else 0.0,
            last_step_id=link.step_id if link else 0,
            paused_s=link.paused_s if link else 0.0,
        )
