"""A sparse layer of Qwen3-30B-A3B on this GPU against a loop of cuBLAS: `python benchmarks/gpu/bench_moe.py`.

One JSON row a number of tokens and op: microseconds a call (median of replays of a CUDA graph; each call has a random router
of its own, so that its experts are others, and weights that have left L2), the experts that it touches, TB/s of the bytes that
it must move and TFLOP/s, with their fractions of --bandwidth and --flops. "layer" is what SparseMlp runs: router GEMM, routing
and experts. With --parts also "gate_up" (with the sorting, where a kernel needs it) and "down" (with the sum). With --baseline
also a loop over the touched experts, with their tokens chosen before: three cuBLAS GEMMs in the dtype of the model, the
activation and an index_add_ each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from pilotfish.kernels.expert_terms import sum_terms
from pilotfish.kernels.graph_timing import num_calls, num_copies, time_in_graph
from pilotfish.kernels.linear import linear
from pilotfish.kernels.moe_config import MoeConfig, MoeSizes, choose_config, table_config
from pilotfish.kernels.moe_gemv import GemvConfig
from pilotfish.kernels.moe_mlp import moe_mlp, run_down, run_gate_up
from pilotfish.kernels.moe_routing import route_tokens
from pilotfish.kernels.moe_sort import sort_pairs

NUM_EXPERTS, NUM_CHOICES, HIDDEN, INTERMEDIATE = 128, 8, 2048, 768
ELEMENT_BYTES = 2
EXPERT_BYTES = 3 * HIDDEN * INTERMEDIATE * ELEMENT_BYTES
ALLOWED_ERROR = 1e-2  # of norms: two ways to round bfloat16


class Layer:
    """Weights enough to leave the L2 between two calls on one of them, and a router for each call."""

    def __init__(self, num_tokens: int) -> None:
        expected = NUM_EXPERTS * (1 - (1 - NUM_CHOICES / NUM_EXPERTS) ** num_tokens) * EXPERT_BYTES
        self.num_tokens = num_tokens
        self.num_calls = num_calls(int(expected))
        copies = num_copies(int(expected))
        self.x = random(num_tokens, HIDDEN, scale=1.0)
        self.routers = random(self.num_calls, NUM_EXPERTS, HIDDEN, scale=HIDDEN**-0.5)
        self.gate_ups = [random(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN, scale=HIDDEN**-0.5) for _ in range(copies)]
        self.downs = [random(NUM_EXPERTS, HIDDEN, INTERMEDIATE, scale=INTERMEDIATE**-0.5) for _ in range(copies)]
        self.routes = [route_tokens(linear(self.x, router), NUM_CHOICES, renormalize=True) for router in self.routers]
        self.touched = [int(experts.unique().numel()) for _, experts in self.routes]
        self.num_touched = sum(self.touched) / len(self.touched)
        self.sizes = MoeSizes(
            num_tokens=num_tokens,
            num_choices=NUM_CHOICES,
            num_experts=NUM_EXPERTS,
            hidden=HIDDEN,
            intermediate=INTERMEDIATE,
        )

    def weights(self, call: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gate_ups[call % len(self.gate_ups)], self.downs[call % len(self.downs)]

    def run(self, call: int) -> torch.Tensor:
        routing = route_tokens(linear(self.x, self.routers[call]), NUM_CHOICES, renormalize=True)
        return sum_terms(moe_mlp(self.x, *self.weights(call), *routing, "silu"))

    def config(self, op: str) -> MoeConfig:
        """Of "gate_up" or "down"."""
        weight = (self.gate_ups if op == "gate_up" else self.downs)[0]
        return choose_config(f"moe_{op}", self.sizes, self.x, weight)

    def baseline(self, call: int) -> Callable[[], torch.Tensor]:
        gate_up, down = self.weights(call)
        weights_TC, experts_TC = self.routes[call]
        groups = []
        for expert in experts_TC.unique().tolist():
            tokens, choices = torch.where(experts_TC == expert)
            groups.append((expert, tokens, weights_TC[tokens, choices, None]))

        def run() -> torch.Tensor:
            out = torch.zeros(self.num_tokens, HIDDEN, device="cuda")
            for expert, tokens, weights in groups:
                gate, up = (self.x[tokens] @ gate_up[expert].T).chunk(2, dim=-1)
                out.index_add_(0, tokens, weights * ((F.silu(gate) * up) @ down[expert].T))
            return out.to(self.x.dtype)

        return run

    def parts(self, call: int) -> dict[str, Callable[[], torch.Tensor]]:
        gate_up_weight, down_weight = self.weights(call)
        weights_TC, experts_TC = self.routes[call]
        gate_up, down = self.config("gate_up"), self.config("down")
        num_gemv = sum(isinstance(config, GemvConfig) for config in (gate_up, down))
        order = sort_pairs(experts_TC, NUM_EXPERTS)

        def sort_and_gate_up() -> torch.Tensor:
            own_order = None if num_gemv == 2 else sort_pairs(experts_TC, NUM_EXPERTS)
            return run_gate_up(self.x, gate_up_weight, experts_TC, own_order, "silu", config=gate_up, sorted_rows=num_gemv == 0)

        h = sort_and_gate_up()

        def down_and_sum() -> torch.Tensor:
            routing = (weights_TC, experts_TC, order)
            return sum_terms(run_down(h, down_weight, *routing, config=down, sorted_rows=num_gemv == 0, after_gate_up=True))

        return {
            "gate_up": sort_and_gate_up,
            "down": down_and_sum,
        }


def random(*shape: int, scale: float) -> torch.Tensor:
    return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(0, scale)


def describe(layer: Layer, op: str, time_us: float, args: argparse.Namespace) -> dict[str, object]:
    """Bytes: the touched experts' weights and each activation in or out of the op once. Operations: of the GEMMs."""
    share = {"layer": 3, "gate_up": 2, "down": 1}[op]
    num_pairs = layer.num_tokens * NUM_CHOICES
    activations = {
        "layer": 2 * layer.num_tokens * HIDDEN,
        "gate_up": layer.num_tokens * HIDDEN + num_pairs * INTERMEDIATE,
        "down": layer.num_tokens * HIDDEN + num_pairs * INTERMEDIATE,
    }[op]
    num_bytes = layer.num_touched * EXPERT_BYTES * share / 3 + ELEMENT_BYTES * activations
    flops = num_pairs * 2 * share * HIDDEN * INTERMEDIATE
    row = {
        "op": op,
        "tokens": layer.num_tokens,
        "experts_touched": round(layer.num_touched, 1),
        "time_us": round(time_us, 2),
        "tb_s": round(num_bytes / time_us / 1e6, 2),
        "fraction_of_bandwidth": round(num_bytes / time_us / 1e6 / args.bandwidth, 3),
        "tflop_s": round(flops / time_us / 1e6, 1),
        "fraction_of_flops": round(flops / time_us / 1e6 / args.flops, 3),
    }
    if op in ("gate_up", "down"):
        row["config"] = dict(table_config(layer.config(op)))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 32, 128, 8192])
    parser.add_argument("--bandwidth", type=float, default=4.28, help="TB/s that the GPU reads at best")
    parser.add_argument("--flops", type=float, default=790.0, help="TFLOP/s of its best bfloat16 GEMM")
    parser.add_argument("--parts", action="store_true", help="its two GEMMs too")
    parser.add_argument("--baseline", action="store_true", help="time the loop too")
    args = parser.parse_args()
    torch.manual_seed(0)
    for num_tokens in args.tokens:
        layer = Layer(num_tokens)
        calls = range(layer.num_calls)
        expected, out = layer.baseline(0)().float(), layer.run(0).float()
        error = ((out - expected).norm() / expected.norm()).item()
        if not error < ALLOWED_ERROR:
            raise SystemExit(f"{num_tokens} tokens: the layer is off by {error:.1e}, relative: its time means nothing")
        row = describe(layer, "layer", time_in_graph([partial(layer.run, call) for call in calls]), args)
        if args.baseline:
            few = range(min(layer.num_calls, 4))  # a graph of a loop has hundreds of nodes
            baseline_us = time_in_graph([layer.baseline(call) for call in few])
            row |= {"baseline_us": round(baseline_us, 2), "speedup": round(baseline_us / row["time_us"], 2)}
        print(json.dumps(row), flush=True)
        if args.parts:
            parts = [layer.parts(call) for call in calls]
            for op in parts[0]:
                print(json.dumps(describe(layer, op, time_in_graph([part[op] for part in parts]), args)), flush=True)
        del layer
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
