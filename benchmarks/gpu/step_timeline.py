"""The time line of steps on a GPU: what each kernel takes, and how long the GPU waits within and between steps.

The engine's own loop runs (overlapped, CUDA graphs), on a dummy model, and torch.profiler traces some of its steps: decode
steps of a full batch, or with `--prefill` those that compute the batch's prompts. One JSON row a batch size, then a row a
kernel: launches and microseconds a step. A kernel that starts early waits for the one before it, so what it takes says little:
`adds_us` is by how much its end is later than that of all before it. Gaps are counted from 5 us: below lie those between two
kernels of one step.

    python benchmarks/gpu/step_timeline.py --shape qwen3-0.6b [--batch-sizes 1,128] [--context 640] [--steps 20] [--prefill]
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pilotfish.common.config import EngineConfig, ModelConfig
from pilotfish.common.requests import EngineRequest, StepOutput, TokenSampling
from pilotfish.scheduler.scheduler_config import SchedulerConfig
from pilotfish.scheduler.step_scheduler import StepScheduler
from pilotfish.workers.runner_setup import set_up_runner
from pilotfish.workers.step_loop import StepLoop
from torch.profiler import ProfilerActivity, profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--batch-sizes", default="1,128", type=lambda text: [int(size) for size in text.split(",")])
    parser.add_argument("--context", type=int, default=640, help="prompt tokens of each sequence")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prefill", action="store_true", help="the prompts' steps instead, with 8192 tokens each")
    parser.add_argument("--kernels", type=int, default=25, help="rows of the longest kernels to print")
    args = parser.parse_args()
    loop, produced = make_loop(args)
    for batch_size in args.batch_sizes:
        trace_steps(loop, produced, batch_size, args)


def make_loop(args: argparse.Namespace, *, max_tokens: int = 250) -> tuple[StepLoop, Counter[str]]:
    """The loop, and how many tokens each sequence has. Sequences may produce `max_tokens`."""
    config = EngineConfig(
        max_num_seqs=max(args.batch_sizes), max_num_batched_tokens=8192 if args.prefill else None, prefix_caching=False
    )
    model = ModelConfig(model=f"dummy:{args.shape}", max_model_len=args.context + max_tokens + 6)
    runner, info = set_up_runner(model, config)
    scheduler = StepScheduler(
        SchedulerConfig(
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            max_model_len=info.max_model_len,
            prefix_caching=False,
        )
    )
    produced: Counter[str] = Counter()

    def count(step: StepOutput) -> None:
        produced.update({sequence.request_id: len(sequence.token_ids) for sequence in step.sequences})

    return StepLoop(runner, scheduler, on_step=count, max_in_flight=2 if torch.cuda.is_available() else 1), produced


def trace_steps(loop: StepLoop, produced: Counter[str], batch_size: int, args: argparse.Namespace) -> None:
    if args.prefill:
        prefill_all(loop, produced, batch_size, args)  # warm
        abort_all(loop, produced)
        traced_ms = prefill_all(loop, produced, batch_size, args)
        abort_all(loop, produced)
        with traced() as trace:
            prefill_all(loop, produced, batch_size, args)
        num_steps = max(1, round(batch_size * args.context / 8192))
        report(trace, batch_size, args, num_steps=num_steps, untraced_ms=traced_ms / num_steps)
    else:
        prefill_all(loop, produced, batch_size, args)
        while min(produced.values()) < 8:  # nothing is new any more
            loop.advance()
        untraced_ms = run_steps(loop, args.steps)
        with traced() as trace:
            run_steps(loop, args.steps)
        report(trace, batch_size, args, num_steps=args.steps, untraced_ms=untraced_ms)
    abort_all(loop, produced)


def prefill_all(
    loop: StepLoop, produced: Counter[str], batch_size: int, args: argparse.Namespace, *, max_tokens: int = 250
) -> float:
    """Milliseconds until all of a new batch have their first token."""
    start_s = time.perf_counter()
    sampling = TokenSampling(temperature=0.0, max_tokens=max_tokens, seed=0)
    for index in range(batch_size):
        prompt = tuple((7 * token + index) % 1000 for token in range(args.context))
        loop.scheduler.add(EngineRequest(request_id=str(index), prompt_token_ids=prompt, sampling=sampling))
    while len(produced) < batch_size:
        loop.advance()
    return (time.perf_counter() - start_s) * 1e3


def abort_all(loop: StepLoop, produced: Counter[str]) -> None:
    for request_id in produced:
        loop.scheduler.abort(request_id)
    while loop.has_work:
        loop.advance()
    loop.finish()
    produced.clear()


@contextmanager
def traced() -> Iterator[profile]:
    with profile(activities=[ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU]) as trace:
        yield trace
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def run_steps(loop: StepLoop, num_steps: int) -> float:
    start_s = time.perf_counter()
    for _ in range(num_steps):
        loop.advance()
    return (time.perf_counter() - start_s) * 1e3 / num_steps


def report(trace: profile, batch_size: int, args: argparse.Namespace, *, num_steps: int, untraced_ms: float) -> None:
    events = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    busy_us, end = 0.0, spans[0][0] if spans else 0.0
    gaps_us = []
    for start, stop in spans:
        if start > end:
            gaps_us.append(start - end)
        busy_us += max(0.0, stop - max(start, end))
        end = max(end, stop)
    total_us = end - spans[0][0] if spans else 0.0
    row = {
        "shape": args.shape,
        "batch": batch_size,
        "step_ms": round(untraced_ms, 3),
        "traced_step_ms": round(total_us / 1e3 / num_steps, 3),
        "gpu_idle_share": round(1 - busy_us / total_us, 3) if total_us else None,
        "idle_in_gaps_from_5_us": round(sum(gap for gap in gaps_us if gap >= 5) / total_us, 3) if total_us else None,
        "longest_gaps_us": [round(gap, 1) for gap in sorted(gaps_us)[-3:]],
        "kernels_per_step": round(len(events) / num_steps, 1),
    }
    print(json.dumps(row), flush=True)
    launches, spent_us, added_us = Counter[str](), Counter[str](), Counter[str]()
    end = spans[0][0] if spans else 0.0
    for event in sorted(events, key=lambda event: event.time_range.end):
        launches[event.name] += 1
        spent_us[event.name] += event.time_range.elapsed_us()
        added_us[event.name] += event.time_range.end - end
        end = event.time_range.end
    for name, us in added_us.most_common(args.kernels):
        per_step = {"us_per_step": round(us / num_steps, 1), "launches_per_step": round(launches[name] / num_steps, 1)}
        each = {"adds_us": round(us / launches[name], 2), "us_each": round(spent_us[name] / launches[name], 2)}
        print(json.dumps({"kernel": name[:110], **per_step, **each}), flush=True)


if __name__ == "__main__":
    main()
