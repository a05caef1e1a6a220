"""Routing policies compared in simulated clusters: prefix hits, time to first token, goodput, balance.

    python benchmarks/simulate_routing.py [--replicas 16 128] [--requests-per-replica 200] [--seed 0] [--json rows.jsonl]

The schedulers, caches, queue and router are the real ones; steps take what those of Qwen3-8B on an H200 do (timed_runner.py).
Goodput is the share of requests that had their first token within 200 ms and each further one within 25 ms on average.
`copies` is how often a prompt that came new and many times at once was computed, 1.0 at best. Everything but the last column
follows from the seed alone.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from pilotfish.common.hashing import block_hashes, root_hash
from pilotfish.common.requests import BlockStored, KvEvent
from replica_simulation import ReplicaSizes, Simulation
from routing_policies import POLICIES
from simulated_workloads import WORKLOADS

SLO_TTFT_MS = 200.0
SLO_TPOT_MS = 25.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One policy in one cluster under one workload. `imbalance`: the busiest replica's time over the mean."""

    workload: str
    num_replicas: int
    policy: str
    num_requests: int
    hit_rate: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    goodput: float
    imbalance: float
    copies: float
    wall_s: float


def simulate(workload: str, policy: str, *, num_replicas: int, num_requests: int, seed: int) -> Outcome:
    """One run to its end."""
    load = WORKLOADS[workload](random.Random(seed), num_replicas=num_replicas, num_requests=num_requests)
    sizes = ReplicaSizes()
    bursts = {block_hashes(prefix, sizes.block_size, parent=root_hash())[-1] for prefix in load.bursts}
    num_computed: Counter[bytes] = Counter()

    def count(_replica: str, events: Sequence[KvEvent]) -> None:
        num_computed.update(e.block_hash for e in events if isinstance(e, BlockStored) and e.block_hash in bursts)

    simulation = Simulation(POLICIES[policy](sizes.block_size), num_replicas=num_replicas, sizes=sizes, on_events=count)
    start_s = time.perf_counter()
    simulation.run(load.conversations)
    wall_s = time.perf_counter() - start_s
    simulation.check_invariants()
    requests, busy_ms = simulation.requests, simulation.busy_ms
    ttfts_ms = sorted(request.ttft_ms for request in requests)
    num_good = sum(r.ttft_ms <= SLO_TTFT_MS and r.tpot_ms <= SLO_TPOT_MS for r in requests)
    return Outcome(
        workload=workload,
        num_replicas=num_replicas,
        policy=policy,
        num_requests=len(requests),
        hit_rate=sum(r.cached_tokens for r in requests) / sum(len(r.prompt) for r in requests),
        ttft_p50_ms=ttfts_ms[len(ttfts_ms) // 2],
        ttft_p99_ms=ttfts_ms[int(len(ttfts_ms) * 0.99)],
        goodput=num_good / len(requests),
        imbalance=max(busy_ms) * num_replicas / sum(busy_ms),
        copies=sum(num_computed.values()) / len(bursts) if bursts else 0.0,
        wall_s=wall_s,
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """All runs, those that can be compared side by side."""
    lines = [
        f"{'workload':16} {'replicas':>8} {'policy':15} {'requests':>8} {'hits':>7} {'TTFT p50':>9} {'p99 ms':>8} "
        f"{'goodput':>10} {'imbalance':>10} {'copies':>7} {'wall s':>7}"
    ]
    for row in outcomes:
        copies = f"{row.copies:7.2f}" if row.copies else f"{'-':>7}"
        lines.append(
            f"{row.workload:16} {row.num_replicas:8} {row.policy:15} {row.num_requests:8} {row.hit_rate:7.1%} "
            f"{row.ttft_p50_ms:9.1f} {row.ttft_p99_ms:8.1f} {row.goodput:10.1%} {row.imbalance:10.3f} {copies} "
            f"{row.wall_s:7.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--requests-per-replica", type=int, default=200)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process")
    parser.add_argument("--json", type=Path, help="write a row for each run here")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.jobs) as pool:
        runs = [
            pool.submit(
                simulate, workload, policy, num_replicas=size, num_requests=size * args.requests_per_replica, seed=args.seed
            )
            for size in args.replicas
            for workload in args.workloads
            for policy in args.policies
        ]
        outcomes = [run.result() for run in runs]
    print(table(outcomes))
    if args.json is not None:
        args.json.write_text("".join(json.dumps(asdict(row)) + "\n" for row in outcomes))


if __name__ == "__main__":
    main()
