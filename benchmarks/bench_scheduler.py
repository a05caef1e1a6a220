"""What the scheduler costs: planning a step, taking its result, matching a prompt, the prefix cache at growing sizes, and EPLB.

Run `python benchmarks/bench_scheduler.py`; it needs neither a model nor a GPU. Times are CPU time of the one thread that
runs: wall time on a quiet machine, and comparable on a busy one.
"""

from __future__ import annotations

import gc
import platform
import random
import statistics
import time
from collections.abc import Callable

from pilotfish.common.hashing import block_hashes, root_hash
from pilotfish.common.requests import EngineRequest, TokenSampling
from pilotfish.scheduler.block_manager import BlockManager
from pilotfish.scheduler.block_trie import BlockTrie, TrieNode
from pilotfish.scheduler.eplb import ExpertLayout, ExpertPlacement, place_experts, rebalance_experts
from pilotfish.scheduler.router import Router, RouterConfig
from pilotfish.scheduler.step_plan import StepPlan, StepResult
from pilotfish.scheduler.step_scheduler import SchedulerConfig, StepScheduler

BLOCK_SIZE = 16
ROOT = root_hash()


def timed_ms(call: Callable[[], object]) -> float:
    start = time.thread_time()
    call()
    return (time.thread_time() - start) * 1e3


def spread(samples_ms: list[float]) -> str:
    ordered = sorted(samples_ms)
    return f"median {statistics.median(ordered):7.3f} ms   p99 {ordered[int(len(ordered) * 0.99)]:7.3f} ms"


def result_of(plan: StepPlan) -> StepResult:
    num_sampled = sum(row.samples for row in plan.rows)
    return StepResult(plan.step_id, tuple(range(num_sampled)), (None,) * num_sampled)


def bench_decode(num_sequences: int, *, num_steps: int = 400) -> None:
    """plan() and update() with all sequences decoding; a block is added or committed in one step of 16 for each of them."""
    scheduler = StepScheduler(
        SchedulerConfig(
            num_blocks=num_sequences * 64,
            block_size=BLOCK_SIZE,
            max_num_seqs=num_sequences,
            max_num_batched_tokens=max(8192, num_sequences),
            max_model_len=4096,
        )
    )
    for number in range(num_sequences):
        prompt = tuple(range(number, number + 100 + number % BLOCK_SIZE))
        sampling = TokenSampling(temperature=0.0, max_tokens=800, seed=0)
        scheduler.add(EngineRequest(request_id=f"request-{number}", prompt_token_ids=prompt, sampling=sampling))
    while scheduler.load().queued_tokens:
        scheduler.update(result_of(scheduler.plan()))
    plans_ms, updates_ms = [], []
    for _ in range(num_steps):
        start = time.thread_time()
        plan = scheduler.plan()
        plans_ms.append((time.thread_time() - start) * 1e3)
        assert len(plan.rows) == num_sequences
        result = result_of(plan)
        updates_ms.append(timed_ms(lambda result=result: scheduler.update(result)))
        scheduler.drain_outputs()
        scheduler.drain_kv_events()
    print(f"  plan()    {num_sequences:5} running sequences   {spread(plans_ms)}")
    print(f"  update()  {num_sequences:5} running sequences   {spread(updates_ms)}")


def insert_path(trie: BlockTrie, tokens: list[int], hashes: list[bytes], blocks: list[int]) -> None:
    node: TrieNode | None = None
    for index, block_hash in enumerate(hashes):
        node = trie.insert(
            tokens[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE],
            parent=node,
            parent_hash=hashes[index - 1] if index else ROOT,
            block_hash=block_hash,
            block_id=blocks[index],
        )


def bench_match(num_tokens: int) -> None:
    """A prompt that is cached whole: hashing its blocks, then the match with every token verified."""
    num_blocks = num_tokens // BLOCK_SIZE
    trie = BlockTrie(BlockManager(num_blocks), block_size=BLOCK_SIZE)
    tokens = [(7 * i) % 50_000 for i in range(num_tokens)]
    blocks = trie.allocate(num_blocks)
    insert_path(trie, tokens, block_hashes(tokens, BLOCK_SIZE, parent=ROOT), blocks)
    trie.release(blocks, tick=1)
    hash_ms, match_ms = [], []
    for _ in range(300):
        start = time.thread_time()
        hashes = block_hashes(tokens, BLOCK_SIZE, parent=ROOT)
        hashed = time.thread_time()
        match = trie.match(tokens, hashes=hashes, root=ROOT)
        match_ms.append((time.thread_time() - hashed) * 1e3)
        hash_ms.append((hashed - start) * 1e3)
        assert match.num_tokens == num_tokens - BLOCK_SIZE
        trie.rollback(match)
    print(f"  hash      {num_tokens:5} tokens              {spread(hash_ms)}")
    print(f"  match     {num_tokens:5} tokens              {spread(match_ms)}")


def bench_trie(num_blocks: int, *, path_blocks: int = 50) -> None:
    """Fill a cache with `num_blocks` distinct blocks, match all, evict all."""
    trie = BlockTrie(BlockManager(num_blocks), block_size=BLOCK_SIZE)
    paths = []
    for number in range(num_blocks // path_blocks):
        tokens = [(number * 31 + i) % 50_000 for i in range(path_blocks * BLOCK_SIZE + 1)]
        tokens[0] = number
        paths.append((tokens, block_hashes(tokens, BLOCK_SIZE, parent=ROOT)))

    def add() -> None:
        for tick, (tokens, hashes) in enumerate(paths):
            blocks = trie.allocate(path_blocks)
            insert_path(trie, tokens, hashes, blocks)
            trie.release(blocks, tick=tick)

    def match() -> None:
        for tick, (tokens, hashes) in enumerate(paths):
            found = trie.match(tokens, hashes=hashes, root=ROOT)
            trie.release(found.block_ids, tick=num_blocks + tick)

    def evict() -> None:
        assert trie.evict(num_blocks) == num_blocks

    gc.collect()
    times_us = [timed_ms(call) * 1e3 / num_blocks for call in (add, match, evict)]
    print(
        f"  {num_blocks:7} blocks   add {times_us[0]:6.2f}   match {times_us[1]:6.2f}   evict {times_us[2]:6.2f}   us a block"
    )


def bench_route(num_replicas: int, *, num_tokens: int = 8192) -> None:
    """Routing a prompt that every replica holds (the most work a match can be), and the replicas' loads."""
    router = Router(RouterConfig(block_size=BLOCK_SIZE))
    hashes = block_hashes(list(range(num_tokens)), BLOCK_SIZE, parent=ROOT)
    for number in range(num_replicas):
        router.add_replica(f"replica-{number}")
        router.trie.insert_speculative(f"replica-{number}", hashes, tick=0)
    route_ms = []
    for number in range(200):
        start = time.thread_time()
        router.route(f"r{number}", hashes=hashes, num_tokens=num_tokens, expected_output_tokens=256, tick=1)
        route_ms.append((time.thread_time() - start) * 1e3)
    print(f"  route     {num_replicas:5} replicas            {spread(route_ms)}")


def bench_eplb(layout: ExpertLayout, *, num_layers: int) -> None:
    """Placing experts by skewed loads, then again after each load changed by up to a tenth, or altogether."""
    rng = random.Random(0)
    loads = [[rng.paretovariate(1.5) for _ in range(layout.num_logical)] for _ in range(num_layers)]
    drifted = [[load * rng.uniform(0.9, 1.1) for load in layer] for layer in loads]
    new = [[rng.paretovariate(1.5) for _ in layer] for layer in loads]
    placement = place_experts(loads, layout)

    def imbalance(placement: ExpertPlacement, loads: list[list[float]]) -> float:
        """Largest rank load over the average, mean of layers."""
        ratios = [max(placement.rank_loads(i, layer)) * layout.num_ranks / sum(layer) for i, layer in enumerate(loads)]
        return statistics.mean(ratios)

    where = f"{layout.num_nodes} nodes" if layout.num_parts > 1 else "no nodes"
    place_ms = [timed_ms(lambda: place_experts(loads, layout)) for _ in range(5)]
    print(f"  place     {where:8}             {spread(place_ms)}   largest rank {imbalance(placement, loads):.3f} of average")
    for name, changed in (("drifted", drifted), ("new", new)):
        move_ms = [timed_ms(lambda changed=changed: rebalance_experts(changed, placement)) for _ in range(5)]
        moved, moves = rebalance_experts(changed, placement)
        share = len(moves) / (num_layers * layout.num_physical)
        print(
            f"  rebalance {where:8} {name:7}     {spread(move_ms)}   largest rank {imbalance(placement, changed):.3f} -> "
            f"{imbalance(moved, changed):.3f} of average, {share:.1%} of the experts moved"
        )


def main() -> None:
    print(f"Python {platform.python_version()}, {platform.machine()}, blocks of {BLOCK_SIZE} tokens")
    print("One step, all sequences decoding:")
    for num_sequences in (64, 256, 1024):
        bench_decode(num_sequences)
    print("A cached prompt:")
    for num_tokens in (1024, 8192, 65536):
        bench_match(num_tokens)
    print("The prefix cache (linear: the same time a block at every size):")
    for num_blocks in (12_500, 25_000, 50_000, 100_000, 200_000):
        bench_trie(num_blocks)
    print("The router, a prompt of 8192 tokens:")
    for num_replicas in (2, 16):
        bench_route(num_replicas)
    print("EPLB: 256 experts, 288 slots, 32 ranks, 58 layers:")
    for num_nodes, num_groups in ((1, 1), (4, 8)):
        layout = ExpertLayout(num_logical=256, num_physical=288, num_ranks=32, num_nodes=num_nodes, num_groups=num_groups)
        bench_eplb(layout, num_layers=58)


if __name__ == "__main__":
    main()
