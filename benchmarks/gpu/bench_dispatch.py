"""The dispatchers of a sparse layer of Qwen3-30B-A3B between data ranks, one a GPU: `python benchmarks/gpu/bench_dispatch.py`.

One JSON row for each way to deal tokens to ranks: microseconds a call, experts included, of the gathering dispatcher in a CUDA
graph and launched eagerly, of the all-to-all one launched eagerly (it waits for the device, so no graph holds it), and of this
rank's experts alone for as many tokens. A call is all behind the router: a mean over calls in a row, on the slowest rank.
The number to take from it is expert_dispatch.MAX_GATHERED_ROWS: ranks times tokens, up to where gathering costs less.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from pilotfish.common.rank_place import RankPlace
from pilotfish.kernels.expert_terms import Summands
from pilotfish.kernels.moe_mlp import moe_mlp
from pilotfish.models.layers.expert_dispatch import Dispatcher, choose_dispatcher
from pilotfish.workers.comm import RankGroup, Rendezvous

NUM_EXPERTS, NUM_CHOICES, HIDDEN, INTERMEDIATE = 128, 8, 2048, 768
NUM_CALLS, NUM_WARM_UP = 24, 6
TIMEOUT_S = 120
Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x, weights, slots


class Layer:
    """One rank's experts and the ways to them."""

    def __init__(self, group: RankGroup, device: torch.device) -> None:
        parallel = group.parallel
        assert parallel.data is not None
        self.data, self.group, self.device = parallel.data, group, device
        self.slots, _ = parallel.expert_shares(NUM_EXPERTS, INTERMEDIATE)
        weights = {"device": device, "dtype": torch.bfloat16}
        self.gate_up = torch.randn(self.slots.size, 2 * INTERMEDIATE, HIDDEN, **weights) * HIDDEN**-0.5
        self.down = torch.randn(self.slots.size, HIDDEN, INTERMEDIATE, **weights) * INTERMEDIATE**-0.5
        self.dispatcher = choose_dispatcher(parallel, self.slots, device=device)

    def experts(self, x_TH: torch.Tensor, weights_TC: torch.Tensor, slots_TC: torch.Tensor) -> Summands:
        return moe_mlp(x_TH, self.gate_up, self.down, weights_TC, slots_TC, "silu")

    def tokens(self, num_tokens: int) -> Tokens:
        x_TH = torch.randn(num_tokens, HIDDEN, device=self.device, dtype=torch.bfloat16)
        scores, slots = torch.rand(num_tokens, NUM_EXPERTS, device=self.device).topk(NUM_CHOICES)
        return x_TH, scores / scores.sum(1, keepdim=True), slots.int()

    def measure(self, rank_tokens: Sequence[int]) -> dict[str, float]:
        """Microseconds a call."""
        num_tokens = rank_tokens[self.data.rank]
        self.data.begin(tuple(rank_tokens), num_tokens=num_tokens)
        calls = [self.tokens(num_tokens) for _ in range(NUM_CALLS)]
        gather, all_to_all = self.dispatcher._gather, self.dispatcher._all_to_all
        own = [(x, weights, slots % self.slots.size) for x, weights, slots in calls]
        return {
            "gather_graph_us": self._time(self._record(gather, calls)),
            "gather_us": self._time(lambda: self._run(gather, calls)),
            "all_to_all_us": self._time(lambda: self._run(all_to_all, calls)),
            "experts_alone_us": self._time(lambda: [self.experts(*call) for call in own]),
        }

    def _run(self, way: Dispatcher, calls: Sequence[Tokens]) -> None:
        for call in calls:
            way.run(*call, self.experts)

    def _record(self, way: Dispatcher, calls: Sequence[Tokens]) -> Callable[[], object]:
        self._run(way, calls[:NUM_WARM_UP])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._run(way, calls)
        return graph.replay

    def _time(self, work: Callable[[], object]) -> float:
        work()
        torch.cuda.synchronize()
        self.group.agree_on_least(0)  # all begin together
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        nanoseconds = int(start.elapsed_time(end) / NUM_CALLS * 1e6)
        return -self.group.agree_on_least(-nanoseconds) / 1e3


def run_rank(place: RankPlace, deals: Sequence[Sequence[int]]) -> list[dict[str, float]]:
    device = torch.device("cuda", place.number)
    torch.cuda.set_device(device)
    layer = Layer(RankGroup.join(place, device), device)
    with torch.inference_mode():
        return [layer.measure(deal) for deal in deals]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count(), metavar="N")
    tokens = [1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
    parser.add_argument("--tokens", type=int, nargs="+", default=tokens, metavar="N", help="of the rank that has the most")
    args = parser.parse_args()
    size = args.ranks
    deals = [deal for most in args.tokens for deal in ([most] * size, [most, *[max(1, most // 16)] * (size - 1)])]
    rendezvous = Rendezvous(host="127.0.0.1", timeout_s=TIMEOUT_S)
    places = [
        RankPlace(
            rank=0,
            size=1,
            data_rank=rank,
            data_size=size,
            epoch=0,
            address=rendezvous.address,
            host="127.0.0.1",
            timeout_s=TIMEOUT_S,
            whole_experts=True,
        )
        for rank in range(size)
    ]
    with ProcessPoolExecutor(size, mp_context=get_context("spawn")) as pool:
        rows = next(iter([rank.result() for rank in [pool.submit(run_rank, place, deals) for place in places]]))
    for deal, row in zip(deals, rows, strict=True):
        print(json.dumps({"rank_tokens": deal, **{name: round(value, 1) for name, value in row.items()}}))


if __name__ == "__main__":
    main()
