"""A StepRunner without a model: every step takes the time that was measured for one like it, and tokens follow from a rule.

An Engine set up with a TimedReplica is a worker in all but the arithmetic: real scheduler, prefix cache, protocol. It serves
tests and benchmarks of everything above the model; the simulation (benchmarks/simulate_routing.py) uses the TimingModel alone,
with a clock of its own. Needs no torch.
"""

from __future__ import annotations

import time
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..common.config import EngineConfig, ModelConfig
from ..common.errors import ConfigError
from ..common.requests import TokenLogprob, TokenSampling, WorkerInfo
from ..scheduler.step_plan import StepPlan, StepResult

VOCAB_SIZE = 97
_LOGPROB = -1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TimingModel:
    """How long a step takes on one replica.

    Attributes:
        decode_ms: (sequences, milliseconds) of steps that only decode, by growing number; in between and beyond on a line.
        prefill_ms_per_token: of a step with many prompt tokens.
    """

    decode_ms: tuple[tuple[int, float], ...]
    prefill_ms_per_token: float

    def step_ms(self, *, num_decoding: int, num_prefill_tokens: int) -> float:
        """A step reads the weights once, which prompt tokens hide when there are enough of them; decoding adds to either."""
        weights_ms = self.decode_ms[0][1]
        ms = max(weights_ms, self.prefill_ms_per_token * num_prefill_tokens)
        return ms + (self._decode_ms(num_decoding) - weights_ms if num_decoding else 0.0)

    def plan_ms(self, plan: StepPlan) -> float:
        num_decoding = sum(row.num_tokens == 1 for row in plan.rows)
        return self.step_ms(num_decoding=num_decoding, num_prefill_tokens=plan.num_tokens - num_decoding)

    def scaled(self, factor: float) -> TimingModel:
        """The same on a replica that takes `factor` times as long."""
        points = tuple((number, factor * ms) for number, ms in self.decode_ms)
        return TimingModel(decode_ms=points, prefill_ms_per_token=factor * self.prefill_ms_per_token)

    def _decode_ms(self, num_decoding: int) -> float:
        points = self.decode_ms
        index = min(max(bisect_left(points, (num_decoding,)), 1), len(points) - 1)
        (low, low_ms), (high, high_ms) = points[index - 1], points[index]
        return low_ms + (high_ms - low_ms) * (num_decoding - low) / (high - low)


# Qwen3-8B in bfloat16 on one H200, docs/performance.md: TPOT at 512 tokens of context, and 128 x 512 prompt tokens in 1.49 s.
QWEN3_8B_H200 = TimingModel(
    decode_ms=((1, 4.10), (8, 4.69), (32, 5.37), (128, 8.96)), prefill_ms_per_token=1.49e3 / (128 * 512)
)


def known_state(token_ids: Iterable[int], *, state: int = 0) -> int:
    """What the next token follows from: all tokens up to there. Adding tokens to a state gives that of the longer sequence."""
    return zlib.crc32(array("i", token_ids).tobytes(), state)


def start_state(sampling: TokenSampling) -> int:
    """The state before the first token: sampled tokens depend on the seed, greedy ones do not."""
    return sampling.seed % 2**32 if sampling.temperature > 0 else 0


class TimedStep:
    """A launched step; `end_s` is when it will have been computed (monotonic clock)."""

    def __init__(self, plan: StepPlan, result: StepResult, *, end_s: float, step_ms: float) -> None:
        self.plan = plan
        self._result = result
        self._end_s = end_s
        self._step_ms = step_ms

    @property
    def has_arrived(self) -> bool:
        return time.monotonic() >= self._end_s

    def result(self) -> StepResult:
        time.sleep(max(0.0, self._end_s - time.monotonic()))
        return self._result

    def spent_ms(self) -> Mapping[str, float]:
        return {"forward": self._step_ms}


class TimedRunner:
    """Runs steps one after the other as a device would: a step launched while another runs begins at its end.

    Of a request's sampling it obeys the seed (above temperature 0) and `logprobs`, with one value for every token: no other
    field changes what it answers.
    """

    failure = ""
    expert_balance = None
    agreement = None

    def __init__(self, timing: TimingModel) -> None:
        self._timing = timing
        self._slots: dict[int, tuple[int, TokenSampling]] = {}
        self._free_s = 0.0

    def launch(self, plan: StepPlan) -> TimedStep:
        step_ms = self._timing.plan_ms(plan)
        self._free_s = max(self._free_s, time.monotonic()) + step_ms / 1e3
        return TimedStep(plan, self._compute(plan), end_s=self._free_s, step_ms=step_ms)

    def close(self) -> None:
        """There is nothing to give back."""

    def _compute(self, plan: StepPlan) -> StepResult:
        for slot in plan.released_slots:
            self._slots.pop(slot, None)
        for admitted in plan.admitted:
            sampling = admitted.request.sampling
            self._slots[admitted.slot] = known_state(admitted.token_ids, state=start_state(sampling)), sampling
        token_ids: list[int] = []
        logprobs: list[TokenLogprob | None] = []
        for row in plan.rows:
            if row.samples:
                state, sampling = self._slots[row.slot]
                token_id = state % VOCAB_SIZE
                self._slots[row.slot] = known_state((token_id,), state=state), sampling
                token_ids.append(token_id)
                logprobs.append(None if sampling.logprobs is None else TokenLogprob(token_id, _LOGPROB, 1))
        return StepResult(plan.step_id, tuple(token_ids), tuple(logprobs))


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedReplica:
    """An Engine's `set_up`: a TimedRunner and facts for it, with the sizes of the EngineConfig, which must name its blocks."""

    timing: TimingModel = QWEN3_8B_H200
    max_model_len: int = 32_768

    def __call__(self, model_config: ModelConfig, engine_config: EngineConfig) -> tuple[TimedRunner, WorkerInfo]:
        """Raises ConfigError: there is no memory to measure, so num_kv_blocks must be given."""
        if engine_config.num_kv_blocks is None:
            raise ConfigError("a replica without a model has no memory to measure: give num_kv_blocks")
        max_num_seqs = engine_config.max_num_seqs
        info = WorkerInfo(
            model_name=model_config.name,
            model_path="",
            architecture="Timed",
            device="timed",
            dtype="float32",
            vocab_size=VOCAB_SIZE,
            max_model_len=min(self.max_model_len, model_config.max_model_len or self.max_model_len),
            block_size=engine_config.block_size,
            num_blocks=engine_config.num_kv_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=engine_config.max_num_batched_tokens or max(2048, max_num_seqs),
            num_parameters=0,
            weight_bytes=0,
            kv_cache_bytes=0,
            load_seconds=0.0,
        )
        return TimedRunner(self.timing), info
