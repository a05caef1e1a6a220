"""What it costs to move experts between GPUs while they decode: steps with moves beside steps without, CUDA graphs on.

One replica of expert-parallel ranks, one a GPU, decodes a batch of a dummy model three times: with experts that stay (off),
with experts that could move and are counted (quiet), and with a rebalance every `--interval` steps (moving). One JSON row each:
milliseconds of steps, and for the last those of the steps that moved experts, how many moved, and the balance (the fullest
rank's tokens over the mean rank's) at the first and last reading. `equal_tokens` is the share of tokens that equal the first
run's: rounding differs with the rank that computes an expert, so texts of random weights part at some token.

    python benchmarks/gpu/expert_moves.py [--shape qwen3-30b-a3b] [--tensor-parallel 2] [--data-parallel 1] [--redundant 16]
        [--interval 200] [--batch-size 32]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from collections.abc import Sequence
from functools import partial

import torch
from pilotfish.common.config import EngineConfig, ModelConfig, ParallelConfig
from pilotfish.common.requests import EngineRequest, StepOutput, TokenSampling
from pilotfish.workers.engine import Engine
from pilotfish.workers.local_replica import LocalReplica

_TIMEOUT_S = 300.0
_WARM_STEPS = 10  # after the prompts: not counted
NEVER = 10**9


class Steps:
    """The messages of the first data rank and when they came; of all data ranks how many requests have ended."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, StepOutput]] = []
        self.num_ended = 0
        self.changed = threading.Condition()

    def __call__(self, data_rank: int, step: StepOutput) -> None:
        with self.changed:
            if data_rank == 0:
                self.seen.append((time.perf_counter(), step))
            self.num_ended += sum(sequence.finish_reason is not None for sequence in step.sequences)
            self.changed.notify_all()

    def tokens(self) -> dict[str, list[int]]:
        tokens: dict[str, list[int]] = {}
        for _, step in self.seen:
            for sequence in step.sequences:
                tokens.setdefault(sequence.request_id, []).extend(sequence.token_ids)
        return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="qwen3-30b-a3b")
    parser.add_argument("--tensor-parallel", type=int, default=2)
    parser.add_argument("--data-parallel", type=int, default=1)
    parser.add_argument("--redundant", type=int, default=16)
    parser.add_argument("--interval", type=int, default=200, help="steps from one rebalance to the next")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences of each data rank")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=1000)
    args = parser.parse_args()
    first: dict[str, list[int]] = {}
    for name, redundant, interval in (
        ("off", 0, 0),
        ("quiet", args.redundant, NEVER),
        ("moving", args.redundant, args.interval),
    ):
        steps = run(args, redundant=redundant, interval=interval)
        first = first or steps.tokens()
        print(
            json.dumps({"run": name, **describe(steps, args), "equal_tokens": share_equal(first, steps.tokens())}), flush=True
        )


def run(args: argparse.Namespace, *, redundant: int, interval: int) -> Steps:
    parallel = ParallelConfig(
        tensor_parallel=args.tensor_parallel,
        data_parallel=args.data_parallel,
        expert_parallel=True,
        redundant_experts=redundant,
        rebalance_interval_steps=interval,
    )
    steps, rng, num_requests = Steps(), random.Random(0), args.batch_size * args.data_parallel
    replica = LocalReplica(parallel, on_step=steps)
    engine = Engine(
        ModelConfig(model=f"dummy:{args.shape}", max_model_len=args.input_len + args.output_len + 16),
        EngineConfig(max_num_seqs=args.batch_size, prefix_caching=False),
        on_step=partial(steps, 0),
        set_up=replica,
    )
    info = engine.start()
    try:
        engines = [engine, *replica.leaders]
        for number in range(num_requests):
            prompt = tuple(rng.choices(range(info.vocab_size), k=args.input_len))
            sampling = TokenSampling(temperature=0.0, max_tokens=args.output_len, seed=0)
            request = EngineRequest(request_id=f"r{number}", prompt_token_ids=prompt, sampling=sampling)
            engines[number // args.batch_size].submit(request)
        with steps.changed:
            finished = steps.changed.wait_for(lambda: steps.num_ended == num_requests or not engine.health().ok, _TIMEOUT_S)
        if not finished or not engine.health().ok:
            raise SystemExit(f"the run did not end: {engine.health()}")
    finally:
        engine.stop()
    return steps


def describe(steps: Steps, args: argparse.Namespace) -> dict[str, object]:
    """Of decode steps of the whole batch."""
    quiet_ms, moving_ms = [], []
    ahead = 1 if torch.cuda.is_available() else 0  # a step is launched before the one before it is reported
    balances = [step.load.expert_balance for _, step in steps.seen]
    moves = [balance.num_moves if balance is not None else 0 for balance in balances]
    full = [index for index, (_, step) in enumerate(steps.seen) if len(step.sequences) == args.batch_size]
    for index in full[_WARM_STEPS:-1]:
        step_ms = (steps.seen[index][0] - steps.seen[index - 1][0]) * 1e3
        moved = moves[index - ahead] != moves[index - ahead - 1]
        (moving_ms if moved else quiet_ms).append(step_ms)
    row: dict[str, object] = {"batch_size": args.batch_size, "steps": summary(quiet_ms)}
    measured = [balance.measured for balance in balances if balance is not None and balance.measured]
    if measured:
        row["moving_steps"] = summary(moving_ms)
        row["experts_moved"] = moves[-1]
        row["balance"] = {"first": round(measured[0], 3), "last": round(measured[-1], 3)}
    return row


def summary(step_ms: Sequence[float]) -> dict[str, float]:
    if not step_ms:
        return {"count": 0}
    ordered = sorted(step_ms)
    at = {f"p{share}_ms": round(ordered[min(len(ordered) - 1, len(ordered) * share // 100)], 3) for share in (50, 99)}
    return {"count": len(ordered), "mean_ms": round(statistics.mean(ordered), 3), **at, "max_ms": round(ordered[-1], 3)}


def share_equal(one: dict[str, list[int]], other: dict[str, list[int]]) -> float:
    pairs = [(a, b) for name in one for a, b in zip(one[name], other[name], strict=True)]
    return round(sum(a == b for a, b in pairs) / len(pairs), 4)


if __name__ == "__main__":
    main()
