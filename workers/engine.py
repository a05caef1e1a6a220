"""The engine of one replica: a thread that runs steps, and the way in and out of it.

Life cycle: `start` loads the model on the engine's thread and returns once steps can run; `stop` ends it. In between callers
on any thread `submit` and `abort`; both only leave a command that the engine takes between two steps, so that neither waits for
one. What happened comes back through `on_step`, called on the engine's thread once a step, in order.

A failing row ends its request and nothing else (model_runner.py). What fails outside of a row (the device is lost, an invariant
broke, `on_step` raised) ends the engine: its phase is FAILED, its requests are not answered, and who watches it starts another
and replays them there.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from ..common.config import EngineConfig, ModelConfig, ParallelConfig
from ..common.errors import ConfigError, InvalidRequest, Overloaded, PilotfishError, Unavailable
from ..common.requests import EngineRequest, FinishReason, StepOutput, WorkerInfo
from ..scheduler.snapshot import SchedulerSnapshot
from ..scheduler.step_scheduler import SchedulerConfig, StepScheduler
from .request_check import check_request
from .runner_setup import set_up_runner
from .step_agreement import ReplicaStopped
from .step_loop import StepLoop, StepRunner

logger = logging.getLogger(__name__)

SetUp = Callable[[ModelConfig, EngineConfig], tuple[StepRunner, WorkerInfo]]


def set_up_on_this_machine(parallel: ParallelConfig) -> SetUp:
    """An engine's `set_up` that needs no Ray: alone, or at the head of ranks in processes of their own.

    Raises:
        ConfigError: several data ranks, which are several engines.
    """
    if parallel.data_parallel > 1:
        raise ConfigError("one engine leads one data rank: leave data_parallel at 1 here, or use `pilotfish serve`")
    if parallel.tensor_parallel == 1:
        return set_up_runner
    from .local_replica import LocalReplica  # ranks need grpc, which an engine alone does without

    return LocalReplica(parallel)


# Requests an engine holds at once, running and waiting. Queues for more belong to whoever feeds it.
MAX_LIVE_REQUESTS = 1024
_PAUSED_WAIT_S = 0.05


class Phase(StrEnum):
    """What the engine is doing."""

    STARTING = "starting"
    IDLE = "idle"
    STEP = "step"
    PAUSED = "paused"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineHealth:
    """`ok`: steps complete, or there is nothing to do; else `message` says why not.

    `step_age_s` is how long the current step has run, 0 outside one.
    """

    ok: bool
    phase: Phase
    step_id: int
    step_age_s: float
    message: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSnapshot:
    """The scheduler's state after the message `step_id`."""

    step_id: int
    scheduler: SchedulerSnapshot


class Engine:
    """See the module. `on_step` must be quick: the next step waits for it.

    `max_steps_in_flight` (see step_loop.py) is one on a CPU and two on a GPU unless it is given. `set_up` makes the runner, on
    the engine's thread: set_up_runner, unless this engine leads several ranks (ranks.py).
    """

    def __init__(
        self,
        model_config: ModelConfig,
        engine_config: EngineConfig,
        *,
        on_step: Callable[[StepOutput], None],
        max_steps_in_flight: int | None = None,
        set_up: SetUp | None = None,
    ) -> None:
        self._model_config = model_config
        self._config = engine_config
        self._on_step = on_step
        self._max_steps_in_flight = max_steps_in_flight
        self._set_up_runner = set_up
        self._runner: StepRunner | None = None
        self._thread = threading.Thread(target=self._run, name="pilotfish-engine", daemon=True)
        self._started: Future[WorkerInfo] = Future()
        self._info: WorkerInfo | None = None
        self._loop: StepLoop | None = None
        # Guards what follows. Notified of commands, of ended requests and of the thread's end.
        self._changed = threading.Condition()
        self._commands: deque[Callable[[StepLoop], object]] = deque()
        self._live: dict[str, float | None] = {}  # request id -> deadline on the monotonic clock
        self._aborting: set[str] = set()
        self._is_accepting = False
        self._is_stopping = False
        self._phase = Phase.STARTING  # IDLE stands for STEP and PAUSED too
        self._failure = ""
        # (deadline, request id); also of requests that have ended. The engine thread's own.
        self._deadlines: list[tuple[float, str]] = []

    def start(self) -> WorkerInfo:
        """Loads the model, measures memory and starts to run steps.

        Raises:
            ConfigError, ModelNotFound, ModelLoadError: the engine cannot start, and why.
        """
        self._thread.start()
        return self._started.result()

    def submit(self, request: EngineRequest) -> None:
        """Accepts a request; its output comes through `on_step`.

        Raises:
            InvalidRequest: it can never run here, or its id is in use.
            Overloaded: too many requests are held already.
            Unavailable: the engine is not running, or is draining.
        """
        if self._info is None:
            raise Unavailable("this engine is still starting")
        check_request(request, vocab_size=self._info.vocab_size, max_model_len=self._info.max_model_len)
        deadline_s = None if request.deadline_ms is None else time.monotonic() + request.deadline_ms / 1e3
        with self._changed:
            if not self._is_accepting:
                raise Unavailable("this engine takes no more requests: it is draining, stopped or has failed")
            if request.request_id in self._live:
                raise InvalidRequest(f"the request id {request.request_id!r} is in use by a running request")
            if len(self._live) >= MAX_LIVE_REQUESTS:
                raise Overloaded(f"this engine holds {MAX_LIVE_REQUESTS} requests already", retry_after_s=1.0)
            self._live[request.request_id] = deadline_s
            self._send(partial(self._add, request, deadline_s))

    def abort(self, request_id: str) -> bool:
        """Ends a request after the current step; False if there is none of this id."""
        with self._changed:
            if request_id not in self._live:
                return False
            if request_id not in self._aborting:
                self._aborting.add(request_id)
                self._send(lambda loop: loop.scheduler.abort(request_id))
            return True

    def pause(self, is_paused: bool) -> None:
        """While paused no step begins, after those in flight; aborts and deadlines end requests as ever."""
        with self._changed:
            self._send(lambda loop: setattr(loop, "is_paused", is_paused))

    def snapshot(self, *, timeout_s: float = 30.0) -> EngineSnapshot:
        """The state between two steps. Raises Unavailable if the engine does not run or no step ends within the timeout."""
        answers: list[EngineSnapshot] = []

        def answer(loop: StepLoop) -> None:
            snapshot = EngineSnapshot(step_id=loop.step_id, scheduler=loop.scheduler.snapshot())
            with self._changed:
                answers.append(snapshot)
                self._changed.notify_all()

        with self._changed:
            if self._is_running:
                self._send(answer)
                self._changed.wait_for(lambda: answers or not self._is_running, timeout_s)
            if not answers:
                raise Unavailable(f"the engine gave no snapshot within {timeout_s:g} s (phase {self.health().phase})")
            return answers[0]

    def drain(self, *, timeout_s: float) -> int:
        """Takes no new requests and waits for those it has; returns how many are left at the timeout."""
        with self._changed:
            self._is_accepting = False
            self._changed.wait_for(lambda: not self._live or not self._is_running, timeout_s)
            return len(self._live)

    def health(self) -> EngineHealth:
        """Never waits for a step."""
        loop, phase, message = self._loop, self._phase, self._failure
        busy_since_s = loop.busy_since_s if loop is not None and self._is_running else None
        age_s = 0.0
        if busy_since_s is None and loop is not None and self._is_running and loop.is_paused:
            phase = Phase.PAUSED
        if busy_since_s is not None:
            phase, age_s = Phase.STEP, time.monotonic() - busy_since_s
            if age_s > self._config.stall_timeout_s:
                message = f"a step has been running for {age_s:.0f} s"
        if self._runner is not None and self._runner.failure:  # the step will never end
            phase, message = Phase.FAILED, self._runner.failure
        step_id = loop.step_id if loop is not None else 0
        ok = phase in (Phase.IDLE, Phase.STEP, Phase.PAUSED) and not message
        return EngineHealth(ok=ok, phase=phase, step_id=step_id, step_age_s=age_s, message=message)

    def stop(self, *, timeout_s: float = 30.0) -> None:
        """Aborts what is running and ends the thread. May be called again."""
        with self._changed:
            self._is_accepting = False
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                logger.error("the engine did not stop within %g s (%s)", timeout_s, self.health())

    @property
    def _is_running(self) -> bool:
        return self._phase is Phase.IDLE

    def _send(self, command: Callable[[StepLoop], object]) -> None:
        """Leaves a command for the engine's thread; the caller holds the lock."""
        self._commands.append(command)
        self._changed.notify_all()

    def _run(self) -> None:
        try:
            loop = self._set_up()
        except Exception as error:
            if not isinstance(error, PilotfishError):
                logger.exception("the engine cannot start")
            self._phase, self._failure = Phase.FAILED, str(error)
            self._started.set_exception(error)
            return
        assert self._info is not None
        self._started.set_result(self._info)
        try:
            self._run_steps(loop)
            phase, failure = Phase.STOPPED, ""
        except ReplicaStopped as end:
            logger.info("%s (%d requests)", end, len(self._live))
            phase, failure = Phase.FAILED, str(end)
        except Exception as error:
            logger.exception("the engine failed with %d requests", len(self._live))
            phase, failure = Phase.FAILED, f"{type(error).__name__}: {error}"
        if self._runner is not None:
            self._runner.close()
        with self._changed:
            self._is_accepting = False
            self._phase, self._failure = phase, failure
            self._changed.notify_all()

    def _set_up(self) -> StepLoop:
        set_up = self._set_up_runner or set_up_runner
        runner, info = set_up(self._model_config, self._config)
        self._runner = runner
        scheduler = StepScheduler(
            SchedulerConfig(
                num_blocks=info.num_blocks,
                block_size=info.block_size,
                max_num_seqs=info.max_num_seqs,
                max_num_batched_tokens=info.max_num_batched_tokens,
                max_model_len=info.max_model_len,
                prefix_caching=self._config.prefix_caching,
            )
        )
        max_in_flight = self._max_steps_in_flight or (1 if info.device == "cpu" else 2)
        loop = StepLoop(runner, scheduler, on_step=self._report, max_in_flight=max_in_flight)
        with self._changed:
            self._info, self._loop = info, loop
            self._phase = Phase.IDLE
            self._is_accepting = not self._is_stopping
        return loop

    def _run_steps(self, loop: StepLoop) -> None:
        while self._take_commands(loop):
            self._expire_deadlines(loop)
            loop.advance()
        for request_id in list(self._live):
            loop.scheduler.abort(request_id)
        loop.finish()

    def _take_commands(self, loop: StepLoop) -> bool:
        """Runs the commands that come until the next turn is due, or until there is work; False when the engine is to stop."""
        while True:
            rest_s = loop.plan_at_s - time.monotonic()
            with self._changed:
                if rest_s > 0:
                    self._changed.wait_for(lambda: self._commands or self._is_stopping, rest_s)
                else:
                    self._changed.wait_for(lambda: self._commands or self._is_stopping or loop.has_work, self._wait_s(loop))
                commands, self._commands = self._commands, deque()
            for command in commands:
                command(loop)
            if rest_s <= 0 or self._is_stopping:
                return not self._is_stopping

    def _wait_s(self, loop: StepLoop) -> float | None:
        """How long nothing may happen before the next turn; None: for ever. A paused loop has deadlines to keep."""
        return _PAUSED_WAIT_S if loop.idle_wait_s is None and loop.is_paused else loop.idle_wait_s

    def _add(self, request: EngineRequest, deadline_s: float | None, loop: StepLoop) -> None:
        loop.add(request)
        if deadline_s is not None:
            heapq.heappush(self._deadlines, (deadline_s, request.request_id))

    def _expire_deadlines(self, loop: StepLoop) -> None:
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            deadline_s, request_id = heapq.heappop(self._deadlines)
            if self._live.get(request_id) == deadline_s:
                loop.scheduler.abort(request_id, FinishReason.DEADLINE)

    def _report(self, step: StepOutput) -> None:
        self._on_step(step)
        finished = [sequence.request_id for sequence in step.sequences if sequence.finish_reason is not None]
        if finished:
            with self._changed:
                for request_id in finished:
                    del self._live[request_id]
                    self._aborting.discard(request_id)
                self._changed.notify_all()
