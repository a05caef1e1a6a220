"""A replica's worker while it serves: connected at each of its places, and watched until it is of no use any more.

A worker of several data ranks takes requests at a place for each, with a link of its own; what ends one place ends all.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Mapping, Sequence

from ..common.cluster_state import ReplicaState
from ..common.identity import CONTROLLER_NAME
from ..common.requests import BlockStored, EngineRequest, StepOutput
from ..proto import worker_pb2
from ..scheduler.snapshot import RunningRequest
from .authority import Authority
from .dispatcher import Dispatcher
from .replica import Happening, Place, Replica
from .worker_link import WorkerLink, WorkerUnfit
from .worker_process import WorkerProcess, worker_name

logger = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 0.25
_SILENCE_PART = 0.4  # of heartbeat_timeout_s; a connection that brings nothing is opened anew, then the replica counts as lost
_MIN_LOOKS = 2  # at a silent worker before it counts as lost


class WorkerWatch:
    """`serve` for each worker. It is of no use once its process has ended, it is silent for `heartbeat_timeout_s`, a step takes
    longer than `stall_timeout_s`, its engine has failed, or its link says so."""

    def __init__(
        self,
        *,
        dispatcher: Dispatcher,
        authority: Authority,
        controller_id: str,
        heartbeat_timeout_s: float,
        stall_timeout_s: float,
    ) -> None:
        self._dispatcher = dispatcher
        self._authority = authority
        self._controller_id = controller_id
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._stall_timeout_s = stall_timeout_s

    async def serve(self, replica: Replica, worker: WorkerProcess, *, until: Awaitable[str]) -> str:
        """Returns why the worker is of no use any more, or what `until` says; it has ended then."""
        links = [self._connect(replica, worker, number) for number in range(len(worker.places))]
        watches = [until, _until_dead(worker, links), *map(_until_unfit, links), *map(self._until_stuck, links)]
        tasks = [asyncio.ensure_future(watch) for watch in watches]
        reason, has_failed = "the controller ends it", False
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            ended = next(task for task in tasks if task in done)  # a process that ended is the cause of other complaints
            reason, has_failed = ended.result(), ended is not tasks[0]
            return reason
        finally:
            for place in replica.places:
                place.link = None
                self._dispatcher.stop_accepting(place.name)  # what one place had is not for another that goes with it
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if has_failed and await worker.has_lost_machine():
                reason, has_failed = f"its machine goes or has gone ({reason})", False
            for place in replica.places:
                if self._dispatcher.remove_replica(place.name, reason, has_failed=has_failed):
                    replica.failures = 0  # a request's fault, which is not tried again
            await worker.end()

    def _connect(self, replica: Replica, worker: WorkerProcess, number: int) -> WorkerLink:
        """Makes one of the worker's places the replica's; nothing is sent before the link runs."""
        serving = worker.places[number]
        place = Place(replica.name if len(worker.places) == 1 else f"{replica.name}/{number}", serving, None)
        place.link = WorkerLink(
            address=serving.address,
            peer=worker_name(replica.name, epoch=serving.info.epoch, rank=serving.rank),
            identity=self._authority.issue(CONTROLLER_NAME),
            silence_timeout_s=_SILENCE_PART * self._heartbeat_timeout_s,
            epoch=serving.info.epoch,
            controller_id=self._controller_id,
            listener=_Listener(replica, place, self._dispatcher, num_places=len(worker.places)),
        )
        replica.places = (*(replica.places if number else ()), place)
        replica.on_move()
        self._dispatcher.add_replica(place.name, place.link, serving.info, group=replica.name)
        return place.link

    async def _until_stuck(self, link: WorkerLink) -> str:
        heard, num_looks = link.last_message_time, 0
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            num_looks = num_looks + 1 if link.last_message_time == heard else 0
            heard = link.last_message_time
            silent_s = time.monotonic() - heard
            # When this process itself stood still, what came meanwhile is yet to be read.
            if silent_s > self._heartbeat_timeout_s and num_looks >= _MIN_LOOKS:
                return f"its worker at {link.address} has been silent for {silent_s:.1f} s"
            if link.failed:
                return f"its engine failed: {link.failure}" if link.failure else "its engine failed"
            if link.step_age_s > self._stall_timeout_s:
                return (
                    f"a step has been running for {link.step_age_s:.1f} s, after step {link.step_id} (phase {link.phase}; "
                    f"stall_timeout_s is {self._stall_timeout_s:g})"
                )


class _Listener:
    """Passes what a link brings to the dispatcher, under the name of its place. A replica is ready when all its places are."""

    def __init__(self, replica: Replica, place: Place, dispatcher: Dispatcher, *, num_places: int) -> None:
        self._replica = replica
        self._name = place.name
        self._dispatcher = dispatcher
        self._num_places = num_places

    def on_snapshot(
        self, snapshot: worker_pb2.SnapshotResponse, orphans: Sequence[RunningRequest]
    ) -> Mapping[str, EngineRequest]:
        blocks = tuple(map(BlockStored, snapshot.block_hashes, snapshot.parent_hashes))
        self._dispatcher.take_snapshot(self._name, blocks=blocks, next_event_id=snapshot.next_event_id)
        return self._dispatcher.adopt(self._name, orphans)

    def on_connected(self) -> None:
        replica = self._replica
        connected = [place for place in replica.places if place.link is not None and place.link.connected]
        if replica.state is ReplicaState.STARTING and len(connected) == self._num_places:
            replica.move(Happening.STARTED)
            replica.settled.set()
            for place in replica.places:
                self._dispatcher.start_accepting(place.name)
            logger.info("%s is ready at %s", replica.name, ", ".join(place.serving.address for place in replica.places))
        self._dispatcher.pump()

    def on_step(self, step: StepOutput) -> bool:
        self._replica.failures = 0
        return self._dispatcher.take_step(self._name, step)


async def _until_dead(worker: WorkerProcess, links: Sequence[WorkerLink]) -> str:
    """What is known of the process that ended, and how far the replica had come."""
    reason = await worker.wait_dead()
    last = max(links, key=lambda link: link.step_id)
    return f"{reason}; the last step was {last.step_id} (phase {last.phase or 'unknown'})"


async def _until_unfit(link: WorkerLink) -> str:
    try:
        await link.run()
    except WorkerUnfit as error:
        return f"its worker cannot be used: {error}"
    raise AssertionError("a link runs until its worker is unfit or it is cancelled")
