"""`pilotfish replay`: a trace of arrivals through the router, without a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..common.errors import InvalidRequest
from ..scheduler.arrivals import read_arrivals
from ..scheduler.replay import Replay, ReplayedRequest
from ..scheduler.router import RouterConfig
from ..scheduler.scheduler_config import SchedulerConfig
from ..scheduler.step_times import StepTime
from .explain import decision_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    fields = "time_ms, token_ids (or block_hashes and num_tokens), output_tokens, tenant"
    parser.add_argument("trace", type=Path, metavar="TRACE", help=f"JSON lines: {fields}")
    parser.add_argument("--replicas", type=int, default=1, help="size of the fleet")
    parser.add_argument("--block-size", type=int, default=16, help="tokens in a block; that of the trace's hashes")
    parser.add_argument("--num-blocks", type=int, default=4096, help="KV blocks of a replica")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="sequences that a replica runs at once")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048, help="tokens in a step")
    parser.add_argument("--step-ms", type=float, default=4.0, help="a step takes this")
    parser.add_argument("--token-ms", type=float, default=0.03, help="and this for each of its tokens")
    config = RouterConfig(block_size=16)
    parser.add_argument("--work-weight", type=float, default=config.work_weight, help="RouterConfig.work_weight")
    parser.add_argument("--decode-weight", type=float, default=config.decode_weight, help="RouterConfig.decode_weight")
    parser.add_argument("--hold-ms", type=int, default=config.hold_ticks, help="longest wait for a better replica, 0 for none")
    parser.add_argument("--explain", metavar="N", type=int, help="show the choices for arrival N (from 0, in order of time)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    try:
        lines = args.trace.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read the trace {args.trace}: {error}") from error
    arrivals = read_arrivals(lines, block_size=args.block_size)
    if not arrivals or args.replicas < 1:
        raise InvalidRequest("a replay needs at least one arrival and one replica")
    if args.explain is not None and not 0 <= args.explain < len(arrivals):
        raise InvalidRequest(f"--explain takes an arrival from 0 to {len(arrivals) - 1}, not {args.explain}")
    router = RouterConfig(
        block_size=args.block_size,
        work_weight=args.work_weight,
        decode_weight=args.decode_weight,
        hold_ticks=args.hold_ms,
        max_decisions=4 * len(arrivals),
    )
    engine = SchedulerConfig(
        num_blocks=args.num_blocks,
        block_size=args.block_size,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=max(len(a.token_ids) + a.output_tokens for a in arrivals),
    )
    replay = Replay.create(router, engine, StepTime.line(args.step_ms, args.token_ms), num_replicas=args.replicas)
    summary = summarize(replay.run(arrivals), replay.busy_ms)
    print(json.dumps(summary) if args.json else "\n".join(f"{name:16} {value:g}" for name, value in summary.items()))
    if args.explain is not None:
        print("\n".join(decision_text(decision) for decision in replay.router.explain(f"r{args.explain}")))
    return 0


def summarize(requests: list[ReplayedRequest], busy_ms: dict[str, float]) -> dict[str, float]:
    """The figures of a replay; `imbalance` is the busiest replica's time over the mean."""
    answered = [request for request in requests if not request.error]
    ttfts_ms = sorted(request.ttft_ms for request in answered) or [0.0]
    num_prompt = sum(len(request.arrival.token_ids) for request in answered)
    return {
        "num_requests": len(requests),
        "num_failed": len(requests) - len(answered),
        "num_held": sum(request.was_held for request in requests),
        "hit_rate": round(sum(request.cached_tokens for request in answered) / max(num_prompt, 1), 4),
        "ttft_p50_ms": round(ttfts_ms[len(ttfts_ms) // 2], 3),
        "ttft_p99_ms": round(ttfts_ms[int(len(ttfts_ms) * 0.99)], 3),
        "imbalance": round(max(busy_ms.values()) * len(busy_ms) / max(sum(busy_ms.values()), 1e-9), 4),
        "span_ms": round(max(request.end_ms for request in requests) - requests[0].arrival.time_ms, 3),
    }
