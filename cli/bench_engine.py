"""An engine in this process, driven with token ids alone: what `bench latency` and `bench throughput` time.

Of several ranks the others are processes on the machine's other GPUs (workers/local_replica.py); data ranks get equally many
of the requests. Neither Ray nor a server takes part. Prompts are random, decoding is greedy and goes on to the asked length,
and all requests of a run are submitted at once; where the engine holds no more, the rest follow as it frees places.
"""

from __future__ import annotations

import os
import queue
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from ..common.config import EngineConfig, ModelConfig, ParallelConfig
from ..common.errors import InternalError, Overloaded
from ..common.requests import EngineRequest, StepOutput, TokenSampling, WorkerInfo
from ..workers.engine import Engine

if TYPE_CHECKING:
    from ..workers.local_replica import LocalReplica

# Steps carry the time at which they came, so that looking at them seldom costs no precision and disturbs the engine least.
_POLL_INTERVAL_S = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRun:
    """One workload from the first submit to the last token.

    Attributes:
        num_preemptions: sequences that had to be computed again for want of KV blocks.
        token_times: (seconds since the start, tokens) of each step that produced any.
        sequences: every prompt with its output, where they were asked for.
    """

    elapsed_s: float
    num_output_tokens: int
    num_preemptions: int
    token_times: tuple[tuple[float, int], ...]
    sequences: tuple[tuple[int, ...], ...] = ()


class BenchEngine:
    """Runs inside its `with` block.

    Raises:
        PilotfishError: the engine cannot start, or a request failed in it.
    """

    def __init__(self, model_config: ModelConfig, engine_config: EngineConfig, parallel: ParallelConfig, *, seed: int) -> None:
        self._steps: queue.SimpleQueue[tuple[float, int, StepOutput]] = queue.SimpleQueue()
        self._replica = _local_replica(parallel, self._on_step) if parallel.num_ranks > 1 else None
        self._engine = Engine(model_config, engine_config, on_step=partial(self._on_step, 0), set_up=self._replica)
        self._random = random.Random(seed)
        self._num_requests = 0
        self._num_preemptions = [0] * parallel.data_parallel  # of each engine's life, as it counts them
        self.info: WorkerInfo

    def __enter__(self) -> BenchEngine:
        try:
            self.info = self._engine.start()
        except BaseException:
            self._engine.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._engine.stop()

    def run(self, num_prompts: int, *, input_len: int, output_len: int, keep_sequences: bool = False) -> EngineRun:
        """`num_prompts` new random prompts of `input_len` tokens, `output_len` tokens out of each."""
        requests = [self._request(input_len, output_len) for _ in range(num_prompts)]
        engines: list[_Submits] = [self._engine, *(self._replica.leaders if self._replica is not None else ())]
        pending = [deque(requests[number :: len(engines)]) for number in range(len(engines))]
        kept: list[StepOutput] = []
        num_preemptions = sum(self._num_preemptions)
        token_times: list[tuple[float, int]] = []
        num_left = num_prompts
        start_s = time.perf_counter()
        while num_left:
            for engine, waiting in zip(engines, pending, strict=True):
                _submit(engine, waiting)
            for now_s, number, step in self._wait():
                if num_tokens := sum(len(sequence.token_ids) for sequence in step.sequences):
                    token_times.append((now_s - start_s, num_tokens))
                if keep_sequences:
                    kept.append(step)
                num_left -= _count_finished(step, output_len)
                self._num_preemptions[number] = step.load.num_preemptions
        return EngineRun(
            elapsed_s=token_times[-1][0],  # a step without tokens may follow: it was under way when the last stop was seen
            num_output_tokens=sum(number for _, number in token_times),
            num_preemptions=sum(self._num_preemptions) - num_preemptions,
            token_times=tuple(token_times),
            sequences=_sequences(requests, kept) if keep_sequences else (),
        )

    def _request(self, input_len: int, output_len: int) -> EngineRequest:
        self._num_requests += 1
        return EngineRequest(
            request_id=f"bench-{self._num_requests}",
            prompt_token_ids=tuple(self._random.choices(range(self.info.vocab_size), k=input_len)),
            sampling=TokenSampling(temperature=0.0, max_tokens=output_len, seed=0),
        )

    def _on_step(self, number: int, step: StepOutput) -> None:
        self._steps.put((time.perf_counter(), number, step))

    def _wait(self) -> list[tuple[float, int, StepOutput]]:
        """(when it came, whose, the step): the steps since the last call, if there were any. Raises InternalError if the
        engine has failed."""
        time.sleep(_POLL_INTERVAL_S)
        if self._steps.empty() and not (health := self._engine.health()).ok:
            raise InternalError(f"the engine is {health.phase}: {health.message}")
        steps = []
        while not self._steps.empty():
            steps.append(self._steps.get())
        return steps


class _Submits(Protocol):
    def submit(self, request: EngineRequest) -> None: ...


def _local_replica(parallel: ParallelConfig, on_step: Callable[[int, StepOutput], None]) -> LocalReplica:
    from ..workers.local_replica import LocalReplica  # ranks need grpc, which one rank does without

    return LocalReplica(parallel, on_step=on_step)


def _submit(engine: _Submits, waiting: deque[EngineRequest]) -> None:
    """As many as the engine takes."""
    while waiting:
        try:
            engine.submit(waiting[0])
        except Overloaded:
            return
        waiting.popleft()


def _count_finished(step: StepOutput, output_len: int) -> int:
    """Sequences that ended in this step; one that ended early is an error, for its time would mean nothing."""
    num_finished = 0
    for sequence in step.sequences:
        if sequence.finish_reason is None:
            continue
        num_tokens = sequence.offset + len(sequence.token_ids)
        if num_tokens != output_len:
            raise InternalError(
                f"{sequence.request_id}: {num_tokens} of {output_len} tokens, then {sequence.finish_reason}. {sequence.error}"
            )
        num_finished += 1
    return num_finished


def _sequences(requests: list[EngineRequest], steps: list[StepOutput]) -> tuple[tuple[int, ...], ...]:
    tokens = {request.request_id: list(request.prompt_token_ids) for request in requests}
    for step in steps:
        for sequence in step.sequences:
            tokens[sequence.request_id].extend(sequence.token_ids)
    return tuple(map(tuple, tokens.values()))


def seconds_since_process_start() -> float:
    """Wall clock since this process was created (proc(5): starttime, in clock ticks after boot)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_s
