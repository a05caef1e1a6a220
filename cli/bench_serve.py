"""`pilotfish bench serve`: a running server under Poisson arrivals, seen from its clients."""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import time
from collections.abc import Iterable
from typing import Any

from ..common.errors import Overloaded, PilotfishError
from .bench_rows import Rows
from .bench_streams import CONNECTIONS, RunStream, StreamTrace


def run(args: argparse.Namespace, rows: Rows) -> int:
    traces, elapsed_s = asyncio.run(_drive(args, rows))
    completed = [trace for trace in traces if trace.error is None]
    num_rejects = sum(isinstance(trace.error, Overloaded) for trace in traces)
    num_errors = len(traces) - len(completed) - num_rejects
    for error in sorted({str(trace.error) for trace in traces if trace.error is not None}):
        rows.say(f"Not completed: {error}")
    series = {
        "TTFT": [trace.ttft_ms for trace in completed],
        "TPOT": [trace.tpot_ms for trace in completed if trace.num_tokens > 1],
        "ITL": [gap_ms for trace in completed for gap_ms in trace.gaps_ms],
    }
    num_good = sum(trace.ttft_ms <= args.slo_ttft_ms and trace.tpot_ms <= args.slo_tpot_ms for trace in completed)
    rows.write(
        {
            "address": args.address,
            "protocol": args.protocol,
            "request_rate": "inf" if math.isinf(args.request_rate) else args.request_rate,
            "num_prompts": args.num_prompts,
            "input_len": args.input_len,
            "output_len": args.output_len,
            "elapsed_s": elapsed_s,
            "completed": len(completed),
            "rejects": num_rejects,
            "errors": num_errors,
            "output_tok_s": sum(trace.num_tokens for trace in completed) / elapsed_s,
            **_percentiles(series),
            "slo_ttft_ms": args.slo_ttft_ms,
            "slo_tpot_ms": args.slo_tpot_ms,
            "goodput_req_s": num_good / elapsed_s,
        },
        **{name: values for name, values in series.items() if values},
    )
    return 1 if num_errors else 0


async def _drive(args: argparse.Namespace, rows: Rows) -> tuple[list[StreamTrace], float]:
    """Every request's trace, in the order of arrival, and the seconds from the first arrival to the last token."""
    rng = random.Random(args.seed)
    prompts = [rng.choices(range(args.vocab_size), k=args.input_len) for _ in range(args.num_prompts)]
    async with CONNECTIONS[args.protocol](args.address, output_len=args.output_len, timeout_s=args.timeout_s) as run_stream:
        rows.say("Warm-up with one request")
        await run_stream(prompts[0], StreamTrace(time.perf_counter()))
        rows.say(f"Sending {args.num_prompts} requests")
        traces: list[StreamTrace] = []
        start_s = due_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for prompt in prompts:
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                traces.append(StreamTrace(time.perf_counter()))
                group.create_task(_record(run_stream, prompt, traces[-1]))
                due_s += 0.0 if math.isinf(args.request_rate) else rng.expovariate(args.request_rate)
        return traces, time.perf_counter() - start_s


async def _record(run_stream: RunStream, prompt: list[int], trace: StreamTrace) -> None:
    try:
        await run_stream(prompt, trace)
    except PilotfishError as error:
        trace.error = error


def _percentiles(series: dict[str, list[float]]) -> dict[str, Any]:
    return {
        f"{name.lower()}_ms_p{percent}": percentile(values, percent) for name, values in series.items() for percent in (50, 99)
    }


def percentile(values: Iterable[float], percent: float) -> float | None:
    """Between the two nearest values, in proportion; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)
