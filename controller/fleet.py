"""The replicas: started, watched, restarted, and ended; more or fewer of them when `resize` says so.

One task a replica leads it through its life (the table in replica.py): start a worker under a new epoch, serve until it dies,
falls silent or stops making progress, end it, and start again unless it fails time after time. One that is to go drains first:
nothing new comes to it, its streams end there or go on on others, then its worker is ended. A controller that was restarted
first takes over the workers that live. Epochs are milliseconds of the clock, so that they grow over controllers too. The name
of a replica that has gone is given again, under a later epoch, so that metrics keep few labels.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from dataclasses import replace
from functools import partial

from ..common.cluster_state import ReplicaState, ReplicaStatus
from ..common.config import FleetConfig, ModelConfig
from ..common.errors import ConfigError, InternalError, ModelLoadError, ModelNotFound, PilotfishError, Unavailable
from ..common.requests import WorkerInfo
from ..text.prepare import ModelLimits
from .authority import Authority
from .dispatcher import Dispatcher
from .replica import Happening, Replica
from .worker_process import Launcher, Misplaced, NoRoom, WorkerDied, WorkerProcess
from .worker_watch import WorkerWatch

logger = logging.getLogger(__name__)

_DRAIN_INTERVAL_S = 0.05
_NOTICE_MARGIN_S = 3.0
_RESTART_PAUSE_S = (0.0, 1.0, 5.0, 15.0)
_MAX_PLACEMENTS = 3
_FINAL = (ConfigError, ModelNotFound, ModelLoadError)  # starting again would end the same way


class Fleet:
    """See the module's docstring. `start`, then `wait_ready`; `stop` ends every worker.

    Attributes:
        model: what new replicas are of.
        changed: set at every move.
    """

    def __init__(
        self,
        config: FleetConfig,
        *,
        model: ModelConfig,
        launcher: Launcher,
        dispatcher: Dispatcher,
        authority: Authority,
        controller_id: str,
        stall_timeout_s: float,
    ) -> None:
        self._config = config
        self.model = model
        self._launcher = launcher
        self._dispatcher = dispatcher
        self._watch = WorkerWatch(
            dispatcher=dispatcher,
            authority=authority,
            controller_id=controller_id,
            heartbeat_timeout_s=config.heartbeat_timeout_s,
            stall_timeout_s=stall_timeout_s,
        )
        self.changed = asyncio.Event()
        self._replicas: list[Replica] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._last_epoch = 0
        self._is_restart = False
        self._num_past_restarts = 0
        self._limits: ModelLimits | None = None
        self._info: WorkerInfo | None = None

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
        if found:  # of what the last one was started with, in a rollout perhaps
            self.model = self._model_of(max(found.values(), key=lambda worker: worker.places[0].info.epoch))
        for name, worker in found.items():
            if len(self._replicas) < num_wanted:
                self._add(name, worker)
            else:
                await worker.end()
        self.resize(num_wanted, "the fleet starts")
        self._is_restart = False  # what is added later is new

    def resize(self, num_wanted: int, reason: str) -> None:
        """Start replicas, or let some go: those first that do not serve, then those with the least to do."""
        staying = self.staying
        for _ in range(num_wanted - len(staying)):
            self.add()
        staying.sort(key=self.worth)
        for replica in staying[: max(0, len(staying) - num_wanted)]:
            self.let_go(replica, reason, within_s=self._config.drain_timeout_s)

    def let_go(self, replica: Replica, reason: str, *, within_s: float, serve_s: float = 0.0) -> None:
        """Drain a replica and end its worker. Streams that have not ended there `within_s` go on elsewhere.

        While no other replica takes requests it does so for up to `serve_s` more.
        """
        if replica.leaving.is_set():
            return
        logger.info("%s is to go: %s", replica.name, reason)
        replica.leave_reason = reason
        replica.leave_by = time.monotonic() + within_s
        replica.serve_until = time.monotonic() + serve_s
        replica.leaving.set()
        if replica.state is ReplicaState.READY:
            replica.move(Happening.DRAIN, reason)
            if not serve_s:
                self._stop_accepting(replica)
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
                self._stop_accepting(replica)
        self._dispatcher.fail_queued(Unavailable("the server is shutting down"))
        deadline = time.monotonic() + grace_s
        while self._dispatcher.num_running and time.monotonic() < deadline:  # noqa: ASYNC110 - seconds, once
            await asyncio.sleep(0.05)
        self._dispatcher.fail_all(Unavailable("the server is shutting down"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

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
            self._info = infos[0]
            self._limits = ModelLimits(
                max_model_len=min(info.max_model_len for info in infos),
                vocab_size=min(info.vocab_size for info in infos),
                kv_capacity_tokens=min(info.num_blocks * info.block_size for info in infos),
            )

    def info(self) -> WorkerInfo | None:
        """The facts of one replica's worker, or of the last one where there is none now; None before any has started."""
        return self._info

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

    def _free_name(self) -> str:
        taken = {replica.name for replica in self._replicas}
        return next(name for name in map("replica-{}".format, itertools.count()) if name not in taken)

    def _num_running_on(self, replica: Replica) -> int:
        return sum(self._dispatcher.num_running_on(place.name) for place in replica.places if place.link is not None)

    def add(self) -> Replica:
        """One more."""
        return self._add(self._free_name())

    def worth(self, replica: Replica) -> tuple[bool, int, int]:
        """The one with the least of it goes first: it does not serve, has the least to do, or came last."""
        return replica.state is ReplicaState.READY, self._num_running_on(replica), -_number(replica.name)

    def is_here(self, replica: Replica) -> bool:
        """Whether it has not gone."""
        return replica in self._replicas

    def _model_of(self, worker: WorkerProcess) -> ModelConfig:
        """What a worker that was found runs."""
        info = worker.places[0].info
        if info.model_version == self.model.model_version:
            return self.model
        return replace(self.model, model=info.model_path, served_name=self.model.name, model_version=info.model_version)

    def _add(self, name: str, worker: WorkerProcess | None = None) -> Replica:
        """A replica with a worker of an earlier controller, or a new one."""
        model = self.model if worker is None else self._model_of(worker)
        replica = Replica(name=name, model=model, on_move=self._on_move)
        replica.has_served = worker is not None or self._is_restart  # what happens to it now is no failed start
        self._replicas.append(replica)
        task = asyncio.create_task(self._lead(replica, worker), name=name)
        task.add_done_callback(partial(self._on_task_end, replica))
        self._tasks.append(task)
        return replica

    def _on_move(self) -> None:
        self._learn_limits()
        self.changed.set()

    def _on_task_end(self, replica: Replica, task: asyncio.Task[None]) -> None:
        self._tasks.remove(task)
        if replica.leaving.is_set():
            self._forget(replica)
            return
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the task of %s failed", replica.name, exc_info=error)
            if replica.state in (ReplicaState.READY, ReplicaState.DRAINING):
                replica.move(Happening.DIED)
            self._give_up(replica, InternalError(f"{replica.name}: {type(error).__name__}: {error}"))

    def _forget(self, replica: Replica) -> None:
        self._replicas.remove(replica)
        self._num_past_restarts += replica.restarts
        replica.settled.set()
        logger.info("%s has gone", replica.name)
        self._on_move()

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
            async with asyncio.timeout(timeout_s) as timeout:

                def on_wait(what: str) -> None:
                    """The time for the start is counted from where it can begin; the launcher limits the wait itself."""
                    timeout.reschedule(asyncio.get_running_loop().time() + timeout_s)
                    replica.message = what
                    self.changed.set()

                return await self._launcher.launch(replica.name, epoch=self._last_epoch, model=replica.model, on_wait=on_wait)
        except TimeoutError:
            raise WorkerDied(f"it was not ready after {timeout_s:g} s (start_timeout_s)") from None

    async def _serve(self, replica: Replica, worker: WorkerProcess) -> str:
        """Returns why the worker has ended."""
        notice = asyncio.create_task(self._heed_notice(replica, worker))
        try:
            return await self._watch.serve(replica, worker, until=self._until_drained(replica))
        finally:
            notice.cancel()
            (error,) = await asyncio.gather(notice, return_exceptions=True)
            if isinstance(error, Exception):
                logger.error("%s would not hear of its node's end", replica.name, exc_info=error)

    async def _until_drained(self, replica: Replica) -> str:
        """Until a replica that is to go has nothing to do any more."""
        await replica.leaving.wait()
        while time.monotonic() < replica.serve_until and not any(map(self._is_accepting, self.staying)):  # noqa: ASYNC110
            await asyncio.sleep(_DRAIN_INTERVAL_S)
        self._stop_accepting(replica)
        self._dispatcher.pump()
        while self._num_running_on(replica) and time.monotonic() < replica.leave_by:  # noqa: ASYNC110 - seconds, once
            await asyncio.sleep(_DRAIN_INTERVAL_S)
        for place in replica.places:
            self._dispatcher.move_away(place.name, f"{replica.name} is to go: {replica.leave_reason}")
        return f"it is to go: {replica.leave_reason}"

    async def _heed_notice(self, replica: Replica, worker: WorkerProcess) -> None:
        """When a machine of the replica is about to go, another replica is started elsewhere, to which its streams go."""
        left_s = max(0.0, await worker.wait_notice() - _NOTICE_MARGIN_S)
        until = time.monotonic() + left_s
        replica.serve_until, replica.leave_by = min(replica.serve_until, until), min(replica.leave_by, until)
        if not replica.leaving.is_set():
            self.add().has_served = True  # there was room for it: what happens to the other now is no failed start
            when = f" in {left_s + _NOTICE_MARGIN_S:.0f} s" if math.isfinite(left_s) else ""
            self.let_go(replica, f"its node is about to go{when}", within_s=0.0, serve_s=left_s)

    def _is_accepting(self, replica: Replica) -> bool:
        return any(place.link is not None and self._dispatcher.is_accepting(place.name) for place in replica.places)

    def _stop_accepting(self, replica: Replica) -> None:
        for place in replica.places:
            if place.link is not None:  # else its worker has just gone: it takes nothing, or is forgotten
                self._dispatcher.stop_accepting(place.name)

    def _give_up(self, replica: Replica, error: PilotfishError) -> None:
        logger.error("%s is given up: %s", replica.name, error.message)
        replica.move(Happening.REFUSED, error.message)
        replica.error = error
        replica.settled.set()
        if self._has_failed:
            self._dispatcher.fail_queued(self._unavailable())


def _number(name: str) -> int:
    return int(name.removeprefix("replica-"))
