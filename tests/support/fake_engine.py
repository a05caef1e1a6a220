"""An engine with the real step scheduler and arithmetic in place of a model, for tests of timing and faults.

The next token is a function of all tokens before it (and of the seed, if wanted), so a replay from known tokens goes on
exactly as the first run would have.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pilotfish.common.errors import InvalidRequest
from pilotfish.common.requests import EngineRequest, ExpertBalance, StepOutput, TokenLogprob, TokenSampling, WorkerInfo
from pilotfish.scheduler.scheduler_config import SchedulerConfig
from pilotfish.scheduler.snapshot import SchedulerSnapshot
from pilotfish.scheduler.step_plan import StepPlan, StepResult
from pilotfish.scheduler.step_scheduler import StepScheduler
from pilotfish.workers.timed_runner import VOCAB_SIZE, known_state


def next_token(token_ids: list[int], *, seed: int) -> int:
    return known_state(token_ids, state=seed % 2**32) % VOCAB_SIZE


def expected_tokens(prompt: list[int], num_tokens: int, *, seed: int = 0) -> list[int]:
    """What a FakeEngine answers to a prompt; seed 0 without seeds."""
    known = list(prompt)
    for _ in range(num_tokens):
        known.append(next_token(known, seed=seed))
    return known[len(prompt) :]


@dataclass(frozen=True)
class Health:
    ok: bool
    phase: str
    step_id: int
    step_age_s: float
    message: str = ""


@dataclass(frozen=True)
class Snapshot:
    step_id: int
    scheduler: SchedulerSnapshot


@dataclass
class FakeEngine:
    """`gate` cleared makes every step wait inside; `step_s` is how long one takes; `refuse` is raised by submit;
    with `uses_seeds` a request's tokens depend on its seed, else on the `weights`."""

    on_step: Callable[[StepOutput], None]
    num_blocks: int = 256
    block_size: int = 16
    max_num_seqs: int = 8
    step_s: float = 0.0
    stall_timeout_s: float = 60.0
    uses_seeds: bool = False
    weights: int = 0
    refuse: Exception | None = None
    expert_balance: ExpertBalance | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    aborted: list[str] = field(default_factory=list)
    submitted: list[EngineRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()
        self.scheduler = StepScheduler(
            SchedulerConfig(
                num_blocks=self.num_blocks,
                block_size=self.block_size,
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=512,
                max_model_len=4096,
            )
        )
        self._tokens: dict[str, list[int]] = {}
        self._sampling: dict[str, TokenSampling] = {}
        self._commands: list[Callable[[], object]] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._failed = False
        self._paused = False
        self._step_id = 0
        self._step_since: float | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def info(self, *, epoch: int = 1) -> WorkerInfo:
        return WorkerInfo(
            model_name="fake",
            model_path="/nowhere",
            architecture="Fake",
            device="cpu",
            dtype="float32",
            vocab_size=VOCAB_SIZE,
            max_model_len=4096,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=512,
            num_parameters=0,
            weight_bytes=0,
            kv_cache_bytes=0,
            load_seconds=0.0,
            epoch=epoch,
        )

    def submit(self, request: EngineRequest) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.submitted.append(request)
        self._command(lambda: self._add(request))

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self._command(lambda: self.scheduler.abort(request_id))

    def pause(self, is_paused: bool) -> None:
        self._command(lambda: setattr(self, "_paused", is_paused))

    def snapshot(self) -> Snapshot:
        done = threading.Event()
        box: list[Snapshot] = []

        def take() -> None:
            box.append(Snapshot(self._step_id, self.scheduler.snapshot()))
            done.set()

        self._command(take)
        if not done.wait(10):
            raise InvalidRequest("no snapshot within 10 s")
        return box[0]

    def health(self) -> Health:
        age_s = 0.0 if self._step_since is None else time.monotonic() - self._step_since
        phase = "failed" if self._failed else "step" if age_s else "paused" if self._paused else "idle"
        return Health(not self._failed and age_s <= self.stall_timeout_s, phase, self._step_id, age_s)

    def fail(self) -> None:
        """As if the device were lost: no step any more, requests are not answered."""
        self._failed = True

    def stop(self) -> None:
        self.gate.set()
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(10)

    def _command(self, command: Callable[[], object]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def _add(self, request: EngineRequest) -> None:
        self._tokens[request.request_id] = [*request.prompt_token_ids, *request.output_token_ids]
        self._sampling[request.request_id] = request.sampling
        self.scheduler.add(request)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._commands or self._stopping or self._may_step):
                    self._changed.wait()
                commands, self._commands = self._commands, []
            if self._stopping:
                return
            for command in commands:
                command()
            plan = None if self._paused else self.scheduler.plan()
            if plan is not None:
                self._step_since = time.monotonic()
                self.gate.wait()
                time.sleep(self.step_s)
                self.scheduler.update(self._compute(plan))
                self._step_since = None
            self.scheduler.check_invariants()
            self._emit(plan.num_tokens if plan else 0)

    @property
    def _may_step(self) -> bool:
        return self.scheduler.has_work and not (self._failed or self._paused)

    def _compute(self, plan: StepPlan) -> StepResult:
        tokens: list[int] = []
        logprobs: list[TokenLogprob | None] = []
        for row in plan.rows:
            if row.samples:
                known, sampling = self._tokens[row.request_id], self._sampling[row.request_id]
                known.append(next_token(known, seed=sampling.seed if self.uses_seeds else self.weights))
                tokens.append(known[-1])
                logprobs.append(None if sampling.logprobs is None else TokenLogprob(known[-1], -1.0, 1))
        return StepResult(plan.step_id, tuple(tokens), tuple(logprobs), {})

    def _emit(self, num_tokens: int) -> None:
        outputs = tuple(self.scheduler.drain_outputs())
        first_event_id, events = self.scheduler.drain_kv_events()
        if outputs or events or num_tokens:
            self._step_id += 1
            self.on_step(
                StepOutput(
                    step_id=self._step_id,
                    sequences=outputs,
                    first_event_id=first_event_id,
                    kv_events=events,
                    num_batched_tokens=num_tokens,
                    load=replace(self.scheduler.load(), expert_balance=self.expert_balance),
                )
            )
