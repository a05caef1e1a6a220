"""When a step is planned: shortly before the one in flight ends, or as soon as there may be two in flight.

    python benchmarks/bench_late_plan.py [--rate 8] [--requests 150] [--rounds 3] [--device qwen3-8b | qwen3-30b-a3b]

A whole Engine, its thread and scheduler, on a device that takes the time measured of one H200 (timed_runner.py); requests of
100 tokens arrive at random (Poisson) and get 128. One JSON row a way and round, in turns: time to the first token, time per
token, and the share of the time that the device waited for a plan while it had sequences. A machine with other work wakes
threads late.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time

from pilotfish.common.config import EngineConfig, ModelConfig
from pilotfish.common.requests import EngineRequest, StepOutput, TokenSampling, WorkerInfo
from pilotfish.scheduler.step_plan import StepPlan
from pilotfish.workers import step_loop
from pilotfish.workers.engine import Engine
from pilotfish.workers.timed_runner import QWEN3_8B_H200, VOCAB_SIZE, TimedReplica, TimedRunner, TimedStep, TimingModel

DEVICES = {
    "qwen3-8b": QWEN3_8B_H200,
    "qwen3-30b-a3b": TimingModel(
        decode_ms=((1, 2.33), (8, 7.2), (32, 13.9), (128, 18.1)), prefill_ms_per_token=0.8e3 / (128 * 512)
    ),
}
PROMPT_TOKENS, OUTPUT_TOKENS = 100, 128
AT_ONCE = {True: 0.0, False: step_loop._ARRIVALS_S}  # for how long after an arrival plans wait


class WatchedRunner(TimedRunner):
    """Notes how long the device waited for each step, where it was not the first of a new burst."""

    def __init__(self, timing: TimingModel) -> None:
        super().__init__(timing)
        self.waited_s = 0.0

    def launch(self, plan: StepPlan) -> TimedStep:
        late_s = time.monotonic() - self._free_s
        if late_s > 0 and any(not row.samples or row.start >= PROMPT_TOKENS for row in plan.rows):
            self.waited_s += late_s
        return super().launch(plan)


def measure(timing: TimingModel, *, at_once: bool, rate: float, num_requests: int) -> dict[str, object]:
    step_loop._ARRIVALS_S = AT_ONCE[at_once]
    runner = WatchedRunner(timing)
    starts_s: dict[str, float] = {}
    firsts_s: dict[str, float] = {}
    ends_s: dict[str, float] = {}

    def on_step(step: StepOutput) -> None:
        now_s = time.monotonic()
        for output in step.sequences:
            firsts_s.setdefault(output.request_id, now_s)
            if output.finish_reason is not None:
                ends_s[output.request_id] = now_s

    def set_up(model_config: ModelConfig, engine_config: EngineConfig) -> tuple[TimedRunner, WorkerInfo]:
        return runner, TimedReplica(timing=timing)(model_config, engine_config)[1]

    config = EngineConfig(device="cpu", max_num_seqs=128, num_kv_blocks=20_000)
    engine = Engine(ModelConfig(model="timed"), config, on_step=on_step, max_steps_in_flight=2, set_up=set_up)
    engine.start()
    generator = random.Random(0)
    sampling = TokenSampling(temperature=0.0, max_tokens=OUTPUT_TOKENS, seed=0)
    begin_s = time.monotonic()
    for number in range(num_requests):
        time.sleep(generator.expovariate(rate))
        prompt = tuple(generator.randrange(VOCAB_SIZE) for _ in range(PROMPT_TOKENS))
        starts_s[str(number)] = time.monotonic()
        engine.submit(EngineRequest(request_id=str(number), prompt_token_ids=prompt, sampling=sampling))
    engine.drain(timeout_s=60)
    spent_s = time.monotonic() - begin_s
    engine.stop()
    ttft_ms = sorted((firsts_s[name] - starts_s[name]) * 1e3 for name in starts_s)
    tpot_ms = [(ends_s[name] - firsts_s[name]) * 1e3 / (OUTPUT_TOKENS - 1) for name in starts_s]
    return {
        "plans": "at once" if at_once else "late",
        "rate": rate,
        "ttft_ms_p50": round(statistics.median(ttft_ms), 2),
        "ttft_ms_p99": round(ttft_ms[len(ttft_ms) * 99 // 100], 2),
        "tpot_ms_p50": round(statistics.median(tpot_ms), 3),
        "device_waited": round(runner.waited_s / spent_s, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=DEVICES, default="qwen3-8b")
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second")
    parser.add_argument("--requests", type=int, default=150, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for number in range(2 * args.rounds):
        row = measure(DEVICES[args.device], at_once=number % 2 == 0, rate=args.rate, num_requests=args.requests)
        print(json.dumps({"device": args.device} | row), flush=True)


if __name__ == "__main__":
    main()
