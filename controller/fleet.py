"""The replicas: started, watched, restarted, and ended; more or fewer of them when `resize` says so.

One task a replica leads it through its life (the table in replica.py): start a worker under a new epoch, serve until it dies,
falls silent or stops making progress, end it, and start again unless it fails time after time. One that is to go drains first:
nothing new comes to it, its streams end there or go on on others, then its worker is ended. A replica of several data ranks
takes requests at a place for each, with a link of its own; what ends one place ends all. A controller that was restarted
first takes over the workers that live. Epochs are milliseconds of the clock, so that they grow over controllers too. The name
of a replica that has gone is given again, under a later epoch, so that metrics keep few labels.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial

from ..common.cluster_state import ReplicaState, ReplicaStatus
from ..common.config import FleetConfig
from ..common.errors import ConfigError, InternalError, ModelLoadError, ModelNotFound, PilotfishError, Unavailable
from ..common.identity import CONTROLLER_NAME
from ..common.requests import BlockStored, EngineRequest, StepOutput, WorkerInfo
from ..proto import worker_pb2
from ..scheduler.snapshot import RunningRequest
from ..text.prepare import ModelLimits
from .authority import Authority
from .dispatcher import Dispatcher
from .replica import Happening, Place, Replica
from .worker_link import WorkerLink, WorkerUnfit
from .worker_process import Launcher, Misplaced, NoRoom, WorkerDied, WorkerProcess, worker_name

logger = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 0.25
_SILENCE_PART = 0.4  # of heartbeat_timeout_s; a connection that brings nothing is opened anew, then the replica counts as lost
_MIN_LOOKS = 2  # at a silent worker before it counts as lost
_DRAIN_INTERVAL_S = 0.05
_RESTART_PAUSE_S = (0.0, 1.0, 5.0, 15.0)
_MAX_PLACEMENTS = 3
_FINAL = (ConfigError, ModelNotFound, ModelLoadError)  # starting again would end the same way


class Fleet:
    """See the module's docstring. `start`, then `wait_ready`; `stop` ends every worker. `changed` is set at every move."""

    def __init__(
        self,
        config: FleetConfig,
        *,
        launcher: Launcher,
        dispatcher: Dispatcher,
        authority: Authority,
        controller_id: str,
        stall_timeout_s: float,
    ) -> None:
        self._config = config
        self._launcher = launcher
        self._dispatcher = dispatcher
        self._authority = authority
        self._controller_id = controller_id
        self._stall_timeout_s = stall_timeout_s
        self.changed = asyncio.Event()
        self._replicas: list[Replica] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._last_epoch = 0
        self._is_restart = False
        self._num_past_restarts = 0
        self._limits: ModelLimits | None = None

    @property
    def num_restarts(self) -> int:
        return self._num_past_restarts + sum(replica.restarts for replica in self._replicas)

    @property
    def is_serving(self) -> bool:
        """Whether requests are taken: by a replica, or by the queue of a fleet that may be without one."""
        is_ready = any(replica.state is ReplicaState.READY for replica in self._replicas)
        return is_ready or (self._config.fewest == 0 and self._limits is not None and not self._has_failed)

    @property
    def staying(self) -> list[Replica]:
        """The replicas that are not to go."""
        return [replica for replica in self._replicas if not replica.leaving.is_set()]

    async def start(self, *, is_restart: bool = False) -> None:
        """Take over living workers and start the missing ones; returns before they serve.

        `is_restart`: an earlier controller had this fleet; a worker that cannot start now is a loss, and tried again.
        """
        self._is_restart = is_restart
        found = dict(sorted((await self._launcher.find()).items(), key=lambda item: _number(item[0])))
        config = self._config
        num_wanted = min(max(len(found) or config.num_replicas, config.fewest), config.most)
        for name, worker in found.items():
            if len(self._replicas) < num_wanted:
                self._add(name, worker)
            else:
                await worker.end()
        self.resize(num_wanted, "the fleet starts")

    def resize(self, num_wanted: int, reason: str) -> None:
        """Start replicas, or let some go: those first that do not serve, then those with the least to do."""
        staying = self.staying
        for _ in range(num_wanted - len(staying)):
            self._add(next(name for name in map("replica-{}".format, itertools.count()) if name not in self._names))
        staying.sort(key=lambda r: (r.state is ReplicaState.READY, self._num_running_on(r), -_number(r.name)))
        for replica in staying[: max(0, len(staying) - num_wanted)]:
            self.let_go(replica, reason, within_s=self._config.drain_timeout_s)

    def let_go(self, replica: Replica, reason: str, *, within_s: float) -> None:
        """Drain a replica and end its worker. Streams that have not ended there `within_s` go on elsewhere."""
        if replica.leaving.is_set():
            return
        logger.info("%s is to go: %s", replica.name, reason)
        replica.leave_reason = reason
        replica.leave_by = time.monotonic() + within_s
        replica.leaving.set()
        if replica.state is ReplicaState.READY:
            replica.move(Happening.DRAIN, reason)
            for place in replica.places:
                self._dispatcher.stop_accepting(place.name)
            self._dispatcher.pump()
        elif replica.state is ReplicaState.FAILED:
            self._forget(replica)
        else:  # nothing runs there
            next(task for task in self._tasks if task.get_name() == replica.name).cancel()

    async def wait_ready(self) -> None:
        """Until every replica serves.

        Raises:
            PilotfishError: why the first of those that failed did.
        """
        replicas = list(self._replicas)
        for replica in replicas:
            await replica.settled.wait()
        for replica in replicas:
            if replica.error is not None:
                raise replica.error

    async def stop(self, *, grace_s: float = 0.0) -> None:
        """End every worker; running requests get `grace_s` to end first, queued ones are told at once."""
        for replica in self._replicas:
            if replica.state is ReplicaState.READY:
                replica.move(Happening.DRAIN)
                for place in replica.places:
                    self._dispatcher.stop_accepting(place.name)
        self._dispatcher.fail_queued(Unavailable("the server is shutting down"))
        deadline = time.monotonic() + grace_s
        while self._dispatcher.num_running and time.monotonic() < deadline:  # noqa: ASYNC110 - seconds, once
            await asyncio.sleep(0.05)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._dispatcher.fail_queued(Unavailable("the server is shutting down"))

    def limits(self) -> ModelLimits:
        """What every replica can take, or could, where there is none now.

        Raises:
            Unavailable: none has served yet, or none ever will.
        """
        if self._limits is None or self._has_failed:
            raise self._unavailable()
        return self._limits

    def _learn_limits(self) -> None:
        serving = [replica for replica in self._replicas if replica.state is not ReplicaState.FAILED]
        infos = [place.serving.info for replica in serving for place in replica.places]
        if infos:
            self._limits = ModelLimits(
                max_model_len=min(info.max_model_len for info in infos),
                vocab_size=min(info.vocab_size for info in infos),
                kv_capacity_tokens=min(info.num_blocks * info.block_size for info in infos),
            )

    def info(self) -> WorkerInfo | None:
        """The facts of one replica's worker, None before any has started."""
        return next((replica.info for replica in self._replicas if replica.info), None)

    def statuses(self) -> tuple[ReplicaStatus, ...]:
        """Of every place that takes requests."""
        return tuple(status for replica in self._replicas for status in replica.statuses())

    def _unavailable(self) -> Unavailable:
        if self._has_failed:
            return Unavailable(f"no replica is left: {self._replicas[0].message}")
        return Unavailable("the model is being loaded; try again in a few seconds", retry_after_s=5.0)

    @property
    def _has_failed(self) -> bool:
        """There are replicas, and none will ever serve."""
        return bool(self._replicas) and all(replica.state is ReplicaState.FAILED for replica in self._replicas)

    @property
    def _names(self) -> set[str]:
        return {replica.name for replica in self._replicas}

    def _num_running_on(self, replica: Replica) -> int:
        return sum(self._dispatcher.num_running_on(place.name) for place in replica.places if place.link is not None)

    def _add(self, name: str, worker: WorkerProcess | None = None) -> None:
        """A replica with a worker of an earlier controller, or a new one."""
        replica = Replica(name=name, on_move=self.changed.set)
        replica.has_served = worker is not None or self._is_restart  # what happens to it now is no failed start
        self._replicas.append(replica)
        task = asyncio.create_task(self._lead(replica, worker), name=name)
        task.add_done_callback(partial(self._on_task_end, replica))
        self._tasks.append(task)

    def _on_task_end(self, replica: Replica, task: asyncio.Task[None]) -> None:
        self._tasks.remove(task)
        if replica.leaving.is_set():
            self._forget(replica)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the task of %s failed", replica.name, exc_info=error)

    def _forget(self, replica: Replica) -> None:
        self._replicas.remove(replica)
        self._num_past_restarts += replica.restarts
        self._learn_limits()
        logger.info("%s has gone", replica.name)
        self.changed.set()

    async def _lead(self, replica: Replica, worker: WorkerProcess | None) -> None:
        """One replica's life."""
        while True:
            try:
                if worker is None:
                    worker = await self._launch(replica)
                replica.has_served = True
                error: PilotfishError = InternalError(f"{replica.name}: {await self._serve(replica, worker)}")
            except PilotfishError as refusal:
                error = refusal
            except WorkerDied as death:
                error = InternalError(f"{replica.name} could not start: {death}")
            except NoRoom as lack:  # where there was room once, there may be again
                error = Unavailable(f"{replica.name} waits for room: {lack}") if replica.has_served else ConfigError(str(lack))
            worker = None
            if replica.leaving.is_set():
                return
            if isinstance(error, _FINAL):
                self._give_up(replica, error)
                return
            replica.move(Happening.DIED, error.message)
            replica.failures += not isinstance(error, Unavailable)
            if not replica.has_served or replica.failures > self._config.max_restarts:
                self._give_up(replica, error)
                return
            logger.warning("%s is lost and will be restarted: %s", replica.name, error.message)
            await asyncio.sleep(_RESTART_PAUSE_S[min(max(replica.failures, 1), len(_RESTART_PAUSE_S)) - 1])
            replica.restarts += 1
            replica.move(Happening.RESTART, f"again, for {error.message}")

    async def _launch(self, replica: Replica) -> WorkerProcess:
        for _ in range(_MAX_PLACEMENTS):
            try:
                return await self._launch_once(replica)
            except Misplaced as problem:
                logger.warning("%s is placed again: %s", replica.name, problem)
                reason = str(problem)
        raise NoRoom(f"{reason}, and nowhere else was found in {_MAX_PLACEMENTS} tries")

    async def _launch_once(self, replica: Replica) -> WorkerProcess:
        self._last_epoch = max(self._last_epoch + 1, int(time.time() * 1000))
        logger.info("%s starts under epoch %d", replica.name, self._last_epoch)
        timeout_s = self._config.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await self._launcher.launch(replica.name, epoch=self._last_epoch)
        except TimeoutError:
            raise WorkerDied(f"it was not ready after {timeout_s:g} s (start_timeout_s)") from None

    async def _serve(self, replica: Replica, worker: WorkerProcess) -> str:
        """Returns why the worker is of no use any more; it has ended then."""
        links = [self._connect(replica, worker, number) for number in range(len(worker.places))]
        watches = [worker.wait_dead(), self._until_drained(replica), *map(_until_unfit, links), *map(self._until_stuck, links)]
        tasks = [asyncio.create_task(watch) for watch in watches]
        reason, has_failed = "the controller ends it", False
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            reason, has_failed = done.pop().result(), True
            return reason
        finally:
            for place in replica.places:
                place.link = None
                self._dispatcher.stop_accepting(place.name)  # what one place had is not for another that goes with it
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
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
            silence_timeout_s=_SILENCE_PART * self._config.heartbeat_timeout_s,
            epoch=serving.info.epoch,
            controller_id=self._controller_id,
            listener=_Listener(replica, place, self._dispatcher, num_places=len(worker.places)),
        )
        replica.places = (*(replica.places if number else ()), place)
        self._learn_limits()
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
            if silent_s > self._config.heartbeat_timeout_s and num_looks >= _MIN_LOOKS:
                return f"its worker at {link.address} has been silent for {silent_s:.1f} s"
            if link.failed:
                return f"its engine failed: {link.failure}" if link.failure else "its engine failed"
            if link.step_age_s > self._stall_timeout_s:
                return (
                    f"a step has been running for {link.step_age_s:.1f} s, after step {link.step_id} (phase {link.phase}; "
                    f"stall_timeout_s is {self._stall_timeout_s:g})"
                )

    async def _until_drained(self, replica: Replica) -> str:
        """Until a replica that is to go has nothing to do any more."""
        await replica.leaving.wait()
        while self._num_running_on(replica) and time.monotonic() < replica.leave_by:  # noqa: ASYNC110 - seconds, once
            await asyncio.sleep(_DRAIN_INTERVAL_S)
        for place in replica.places:
            self._dispatcher.move_away(place.name, f"{replica.name} is to go: {replica.leave_reason}")
        return f"it is to go: {replica.leave_reason}"

    def _give_up(self, replica: Replica, error: PilotfishError) -> None:
        logger.error("%s is given up: %s", replica.name, error.message)
        replica.move(Happening.REFUSED, error.message)
        replica.error = error
        self._learn_limits()
        replica.settled.set()
        if self._has_failed:
            self._dispatcher.fail_queued(self._unavailable())


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


def _number(name: str) -> int:
    return int(name.removeprefix("replica-"))


async def _until_unfit(link: WorkerLink) -> str:
    try:
        await link.run()
    except WorkerUnfit as error:
        return f"its worker cannot be used: {error}"
    raise AssertionError("a link runs until its worker is unfit or it is cancelled")
