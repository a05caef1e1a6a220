"""Routing policies compared in simulated clusters: prefix hits, time to first token, goodput, balance.

    python benchmarks/simulate_routing.py [--replicas 16 128] [--requests-per-replica 200] [--seeds 0 1 2] [--json rows.jsonl]

The schedulers, caches, queue and router are the real ones; steps take what those of Qwen3-8B on an H200 do (timed_runner.py).
Goodput is the share of requests that had their first token within 200 ms and each further one within 25 ms on average.
`busiest` is balance in time: what a request would have to wait at the busiest replica (the prompts there that are not computed
yet, and one step of what decodes there), the mean of moments while requests arrive. `makespan` is the time that the busiest
replica computed, `busy` the same over the mean, `in flight` the requests at the fullest replica over the mean of moments, again
the mean. `copies` is how often a prompt that came new and many times at once was computed, 1.0 at best. With several seeds a
row is the mean of theirs. Everything but the last column follows from the seeds alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pilotfish.common.hashing import block_hashes, root_hash
from pilotfish.common.requests import BlockStored, KvEvent
from pilotfish.workers.timed_runner import QWEN3_8B_H200
from replica_simulation import ReplicaSizes, SimulatedRequest, Simulation
from routing_policies import POLICIES
from simulated_workloads import WORKLOADS

SLO_TTFT_MS = 200.0
SLO_TPOT_MS = 25.0
NUM_MOMENTS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One policy in one cluster under one workload; see the module."""

    workload: str
    num_replicas: int
    policy: str
    seed: int
    num_requests: int
    hit_rate: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    goodput: float
    busiest_ms: float
    makespan_s: float
    busy: float
    in_flight: float
    copies: float
    wall_s: float


FIGURES = (
    "hit_rate",
    "ttft_p50_ms",
    "ttft_p99_ms",
    "goodput",
    "busiest_ms",
    "makespan_s",
    "busy",
    "in_flight",
    "copies",
    "wall_s",
)


def simulate(
    workload: str, policy: str, *, num_replicas: int, num_requests: int, seed: int, sizes: ReplicaSizes | None = None
) -> Outcome:
    """One run to its end."""
    load = WORKLOADS[workload](random.Random(seed), num_replicas=num_replicas, num_requests=num_requests)
    sizes = sizes or ReplicaSizes()
    bursts = {block_hashes(prefix, sizes.block_size, parent=root_hash())[-1] for prefix in load.bursts}
    num_computed: Counter[bytes] = Counter()

    def count(_replica: str, events: Sequence[KvEvent]) -> None:
        num_computed.update(e.block_hash for e in events if isinstance(e, BlockStored) and e.block_hash in bursts)

    simulation = Simulation(POLICIES[policy](sizes.block_size), num_replicas=num_replicas, sizes=sizes, on_events=count)
    start_s = time.perf_counter()
    gc.disable()  # nothing here is a cycle, and a collector that looks through all prompts takes a quarter of the time
    try:
        simulation.run(load.conversations)
    finally:
        gc.enable()
    wall_s = time.perf_counter() - start_s
    simulation.check_invariants()
    requests, busy_ms = simulation.requests, simulation.busy_ms
    ttfts_ms = sorted(request.ttft_ms for request in requests)
    busiest_ms, in_flight = balance(requests, num_replicas=num_replicas)
    num_good = sum(r.ttft_ms <= SLO_TTFT_MS and r.tpot_ms <= SLO_TPOT_MS for r in requests)
    return Outcome(
        workload=workload,
        num_replicas=num_replicas,
        policy=policy,
        seed=seed,
        num_requests=len(requests),
        hit_rate=sum(r.cached_tokens for r in requests) / sum(len(r.prompt) for r in requests),
        ttft_p50_ms=ttfts_ms[len(ttfts_ms) // 2],
        ttft_p99_ms=ttfts_ms[int(len(ttfts_ms) * 0.99)],
        goodput=num_good / len(requests),
        busiest_ms=busiest_ms,
        makespan_s=max(busy_ms) / 1e3,
        busy=max(busy_ms) * num_replicas / sum(busy_ms),
        in_flight=in_flight,
        copies=sum(num_computed.values()) / len(bursts) if bursts else 0.0,
        wall_s=wall_s,
    )


def balance(requests: Sequence[SimulatedRequest], *, num_replicas: int) -> tuple[float, float]:
    """What a request would have waited at the busiest replica, and the requests at the fullest one over the mean: means of
    moments from a fifth of the arrivals' time on."""
    end_ms = max(request.arrival_ms for request in requests if request.turn == 0)
    moments = [end_ms * (0.2 + 0.8 * number / NUM_MOMENTS) for number in range(NUM_MOMENTS)]
    names = [f"replica-{number}" for number in range(num_replicas)]
    waits_ms, ratios = [], []
    for now_ms in moments:
        decoding, queued = Counter[str](), Counter[str]()
        for request in requests:
            if request.sent_ms <= now_ms < request.end_ms:
                decoding[request.replica] += 1
                if now_ms < request.first_token_ms:
                    queued[request.replica] += len(request.prompt) - request.cached_tokens
        waits_ms.append(
            max(
                QWEN3_8B_H200.prefill_ms_per_token * queued[name]
                + QWEN3_8B_H200.step_ms(num_decoding=decoding[name], num_prefill_tokens=0)
                for name in names
            )
        )
        ratios.append(max(decoding.values()) * num_replicas / decoding.total() if decoding else 1.0)
    return statistics.mean(waits_ms), statistics.mean(ratios)


def means(outcomes: Sequence[Outcome]) -> Iterable[Outcome]:
    """Of the seeds of each policy, cluster and workload."""
    groups: dict[tuple[str, int, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.workload, outcome.num_replicas, outcome.policy), []).append(outcome)
    for same in groups.values():
        yield replace(same[0], **{name: statistics.mean(getattr(o, name) for o in same) for name in FIGURES})


def table(outcomes: Sequence[Outcome]) -> str:
    """All runs, those that can be compared side by side."""
    lines = [
        f"{'workload':16} {'replicas':>8} {'policy':15} {'requests':>8} {'hits':>7} {'TTFT p50':>9} {'p99 ms':>8} "
        f"{'goodput':>10} {'busiest ms':>10} {'makespan':>8} {'busy':>6} {'in flight':>9} {'copies':>7} {'wall s':>7}"
    ]
    for row in means(outcomes):
        copies = f"{row.copies:7.2f}" if row.copies else f"{'-':>7}"
        lines.append(
            f"{row.workload:16} {row.num_replicas:8} {row.policy:15} {row.num_requests:8} {row.hit_rate:7.1%} "
            f"{row.ttft_p50_ms:9.1f} {row.ttft_p99_ms:8.1f} {row.goodput:10.1%} {row.busiest_ms:10.1f} {row.makespan_s:8.3f} "
            f"{row.busy:6.3f} {row.in_flight:9.2f} "
            f"{copies} {row.wall_s:7.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--requests-per-replica", type=int, default=200)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process")
    parser.add_argument("--json", type=Path, help="write a row for each run here")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.jobs) as pool:
        runs = [
            pool.submit(simulate, workload, policy, num_replicas=size, num_requests=size * args.requests_per_replica, seed=seed)
            for seed in args.seeds
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
