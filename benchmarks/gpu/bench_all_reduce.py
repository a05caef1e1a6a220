"""Sums over the ranks of this machine, by size and way: `python benchmarks/gpu/bench_all_reduce.py`.

A process a GPU (--ranks). One JSON row a size, from rank 0: microseconds a call, the median of replays of a CUDA graph of many
calls one behind the other, of

    nccl             NCCL's all-reduce
    torch_one_shot   torch.ops.symm_mem.one_shot_all_reduce, up to --torch-max-bytes
    one_shot         kernels/all_reduce.py
    two_shot         the same in two trips, with more than two ranks or --two-shot
    one_shot_norm    with the residual and the norm in the same kernel
    sum_then_norm    one_shot, then kernels/rms_norm.py
    nccl_then_norm   NCCL's all-reduce, then kernels/rms_norm.py
    push_then_norm   copies by copy engine (workers/pushed_sums.py), two ranks' sum made in kernels/rms_norm.py
    norm             kernels/rms_norm.py alone
    gather           kernels/all_gather.py, of so many bytes a rank; nccl_gather
    scatter          kernels/reduce_scatter.py, of so many bytes a rank and so many by the number of ranks back; nccl_scatter

and where messages are as large as those of steps in halves (models/layers/stack.py)

    product          of the rows with a matrix of 3 times --hidden columns
    product_nccl     with NCCL's sum beside it, as those steps start it
    product_push     with the copies beside it

Rows are --hidden numbers of bfloat16. `wrong` names what differs from NCCL's (must be empty). The largest sizes at which our
ways are the quickest belong into workers/peer_collectives.py. NVLink multicast stays off.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context

import torch
import torch.distributed as dist
from pilotfish.common.rank_place import RankPlace
from pilotfish.kernels import all_gather, reduce_scatter
from pilotfish.kernels.all_reduce import all_reduce, all_reduce_norm
from pilotfish.kernels.peer_buffers import PeerBuffers
from pilotfish.kernels.rms_norm import rms_norm
from pilotfish.models.parallel import StartedSum
from pilotfish.workers.comm import RankGroup, Rendezvous
from pilotfish.workers.peer_collectives import MAX_ONE_SHOT_SENT_BYTES
from pilotfish.workers.pushed_sums import PushedSums

HOST, TIMEOUT_S, MAX_RUN_S, EPS, REPLAYS = "127.0.0.1", 60.0, 560.0, 1e-6, 15
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
Call = Callable[[], object]


def graph_microseconds(group: RankGroup, run: Call, *, num_calls: int) -> float:
    """All ranks together. The graph is captured once and replayed REPLAYS times."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(num_calls):
            run()
    graph.replay()
    group.agree_on_least(0)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    replays_ms = [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]
    return statistics.median(replays_ms[1:]) * 1e3 / num_calls


def torch_one_shot(x: torch.Tensor) -> Call:
    """torch's own, on a copy of x in its symmetric memory."""
    import torch.distributed._symmetric_memory as symmetric_memory

    name = dist.group.WORLD.group_name
    shared = symmetric_memory.empty(x.numel(), dtype=x.dtype, device=x.device)
    symmetric_memory.rendezvous(shared, name)
    shared.copy_(x.view(-1))
    torch.cuda.synchronize()
    return lambda: torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", name)


def ways_beside(group: RankGroup, pushed: PushedSums | None, x: torch.Tensor) -> dict[str, Call]:
    weight, total = torch.randn(x.shape[1], 3 * x.shape[1], dtype=x.dtype, device=x.device), x.clone()
    product = x @ weight

    def beside(start: Callable[[], StartedSum | None]) -> None:
        started = start()
        torch.mm(x, weight, out=product)
        if started is not None:
            started.finish()

    calls: dict[str, Call] = {
        "product": lambda: beside(lambda: None),
        "product_nccl": lambda: beside(lambda: group.start_sum(total)),
    }
    if pushed is not None:
        calls["product_push"] = lambda: beside(lambda: pushed.start(x))
    return calls


def push_then_norm(
    pushed: PushedSums, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    started = pushed.start(x)
    assert started is not None
    return started.wait_and_norm(residual, weight, EPS)


def ways(peers: PeerBuffers, pushed: PushedSums | None, x: torch.Tensor, options: argparse.Namespace) -> dict[str, Call]:
    residual, weight, total = torch.randn_like(x), torch.randn_like(x[0]), x.clone()
    calls: dict[str, Call] = {"nccl": lambda: dist.all_reduce(total)}
    if x.nbytes <= options.torch_max_bytes:
        calls["torch_one_shot"] = torch_one_shot(x)
    calls["one_shot"] = lambda: all_reduce(x, peers)
    if options.two_shot or options.ranks > 2:
        calls["two_shot"] = lambda: all_reduce(x, peers, two_shot=True)
        calls["two_shot_norm"] = lambda: all_reduce_norm(x, residual, weight, EPS, peers, two_shot=True)
    calls["one_shot_norm"] = lambda: all_reduce_norm(x, residual, weight, EPS, peers)
    calls["sum_then_norm"] = lambda: rms_norm(all_reduce(x, peers), weight, EPS, residual_TH=residual)
    calls["nccl_then_norm"] = lambda: (dist.all_reduce(total), rms_norm(total, weight, EPS, residual_TH=residual))
    if pushed is not None:
        calls["push_then_norm"] = lambda: push_then_norm(pushed, x, residual, weight)
    calls["norm"] = lambda: rms_norm(x, weight, EPS, residual_TH=residual)
    if all_gather.unfit_reason(x.shape, x.dtype, peers) is None:
        gathered = x.new_empty(peers.size * x.shape[0], x.shape[1])
        calls["gather"] = lambda: all_gather.all_gather(x, peers)
        calls["nccl_gather"] = lambda: dist.all_gather_into_tensor(gathered, x)
    if reduce_scatter.unfit_reason(x.shape, x.dtype, peers) is None:
        rows = x.new_empty(x.shape[0] // peers.size, x.shape[1])
        calls["scatter"] = lambda: reduce_scatter.reduce_scatter(x, peers)
        calls["nccl_scatter"] = lambda: dist.reduce_scatter_tensor(rows, x)
    return calls


def find_wrong(peers: PeerBuffers, pushed: PushedSums | None, x: torch.Tensor) -> list[str]:
    total = x.clone()
    dist.all_reduce(total)
    pairs = {
        "one_shot": (all_reduce(x, peers), total),
        "two_shot": (all_reduce(x, peers, two_shot=True), total),
        "one_shot_norm": (all_reduce_norm(x, torch.zeros_like(x), torch.ones_like(x[0]), EPS, peers)[1], total),
    }
    if pushed is not None:
        pairs["push_then_norm"] = push_then_norm(pushed, x, torch.zeros_like(x), torch.ones_like(x[0]))[1], total
    if all_gather.unfit_reason(x.shape, x.dtype, peers) is None:
        gathered = x.new_empty(peers.size * x.shape[0], x.shape[1])
        dist.all_gather_into_tensor(gathered, x)
        pairs["gather"] = all_gather.all_gather(x, peers).flatten(0, 1), gathered
    if reduce_scatter.unfit_reason(x.shape, x.dtype, peers) is None:
        pairs["scatter"] = reduce_scatter.reduce_scatter(x, peers), total.chunk(peers.size)[peers.rank]
    torch.cuda.synchronize()
    wrong = [name for name, (ours, theirs) in pairs.items() if not torch.allclose(ours, theirs, rtol=2.0**-7, atol=1e-2)]
    failures = [peers.failure, "" if pushed is None else pushed.peers.buffers.failure]
    return [*wrong, *filter(None, failures)]


def measure(
    group: RankGroup, pushed: PushedSums | None, device: torch.device, num_bytes: int, options: argparse.Namespace
) -> None:
    assert group.peers is not None
    peers = group.peers.buffers
    rows = num_bytes // (2 * options.hidden)
    x = torch.randn(rows, options.hidden, dtype=torch.bfloat16, device=device)
    wrong = find_wrong(peers, pushed, x)
    num_calls = 64 if num_bytes <= 1 << 20 else 8
    calls = ways(peers, pushed, x, options)
    if num_bytes >= MAX_ONE_SHOT_SENT_BYTES:
        calls |= ways_beside(group, pushed, x)
    timed = {name: round(graph_microseconds(group, call, num_calls=num_calls), 2) for name, call in calls.items()}
    if group.place.rank == 0:
        print(json.dumps({"bytes": num_bytes, "rows": rows, **timed, "wrong": wrong}), flush=True)


@torch.inference_mode()
def run_rank(place: RankPlace, options: argparse.Namespace) -> None:
    os.environ.update(NO_MULTICAST)
    device = torch.device("cuda", place.rank)
    torch.cuda.set_device(device)
    torch.manual_seed(place.rank)
    host, _, port = place.address.rpartition(":")
    store = dist.PrefixStore("torch", dist.TCPStore(host, int(port), is_master=False))
    dist.init_process_group("nccl", store=store, rank=place.rank, world_size=place.size, device_id=device)
    group = RankGroup.join(place, device, peer_capacity_bytes=max(options.sizes))
    if group.peers is None:
        raise SystemExit("these ranks cannot share memory; the log above says why")
    group.open_large_sums(max(options.sizes))
    pushed, group.pushed = group.pushed, None  # NCCL's are started too
    for num_bytes in options.sizes:
        measure(group, pushed, device, num_bytes, options)
    group.agree_on_least(0)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[8192 << shift for shift in range(14)], help="bytes of a message"
    )
    parser.add_argument("--torch-max-bytes", type=int, default=1 << 22)
    parser.add_argument("--two-shot", action="store_true", help="time two shots with two ranks too")
    options = parser.parse_args()
    rendezvous = Rendezvous(host=HOST, timeout_s=TIMEOUT_S)
    shared = {"size": options.ranks, "epoch": 1, "address": rendezvous.address, "host": HOST, "timeout_s": TIMEOUT_S}
    start = partial(get_context("spawn").Process, target=run_rank)
    processes = [start(args=(RankPlace(rank=rank, **shared), options)) for rank in range(options.ranks)]
    for process in processes:
        process.start()
    try:
        end_s = time.monotonic() + MAX_RUN_S
        while any(process.is_alive() for process in processes):
            processes[0].join(0.5)
            if any(process.exitcode for process in processes) or time.monotonic() > end_s:
                raise SystemExit(f"the ranks ended with {[process.exitcode for process in processes]}; None: still running")
    finally:
        for process in processes:
            process.kill()


if __name__ == "__main__":
    main()
