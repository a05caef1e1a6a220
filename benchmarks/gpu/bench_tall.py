"""The CUDA C++ kernel for many pairs an expert (kernels/tall_experts.py) against what serves the same products today.

    python benchmarks/gpu/bench_tall.py                      # experts of Qwen3-30B-A3B, and layers of Qwen3-8B as one expert
    python benchmarks/gpu/bench_tall.py --tokens 8192 --replays 300 --configs '[{"most_pairs": 192, "num_stages": 3}]'

JSON rows: for each product and number of tokens one of the baseline (the tuned table's choice for experts, cuBLAS and the
activation's kernel for a dense layer), then one for each config. Microseconds of a call in a CUDA graph, over weights that have
left L2 (the first product of experts with its sorting, the second with its sum), TFLOP/s, and the error relative to the
baseline, in norms. Many --replays show what is left when the card has reached its power limit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from pilotfish.kernels import tuning
from pilotfish.kernels.graph_timing import num_copies, time_in_graph
from pilotfish.kernels.moe_config import table_config
from pilotfish.kernels.tall_experts import TallConfig, tall_linear
from pilotfish.kernels.tune_linear import LinearCase
from pilotfish.kernels.tune_moe import TALL_STREAMS, MoeCase, moe_cases

DENSE = [("gated_linear", (24576, 4096)), ("linear", (6144, 4096)), ("linear", (4096, 4096)), ("linear", (4096, 12288))]
ALLOWED_ERROR = 1e-2  # of norms: two ways to round bfloat16

Calls = Sequence[Callable[[], torch.Tensor]]


def expert_rows(case: MoeCase, configs: list[TallConfig], num_replays: int) -> Iterator[dict[str, object]]:
    """The baseline's row and those of the configs for one product of experts."""
    moe = case.moe
    chosen = tuning.lookup(
        case.op, torch.bfloat16, case.sizes, case.num_rows, torch.device("cuda", torch.cuda.current_device())
    )
    shared = {"op": case.op, "tokens": moe.num_tokens}
    flops = moe.num_tokens * moe.num_choices * moe.hidden * moe.intermediate * (4 if case.op == "moe_gate_up" else 2)
    baseline = chosen or case.baseline
    expected = case.calls(baseline, num_weights=1)[0]()
    yield row(shared, dict(baseline), case.calls(baseline), None, flops, num_replays)
    for config in map(table_config, configs):
        yield row(shared, dict(config), case.calls(config), expected, flops, num_replays)


def dense_rows(case: LinearCase, configs: list[TallConfig], num_replays: int) -> Iterator[dict[str, object]]:
    """The same for a dense layer: cuBLAS, and the kernel with all rows as the pairs of one expert."""
    num_outputs, num_inputs = case.sizes
    shared = {"op": case.op, "tokens": case.num_rows, "outputs": num_outputs, "inputs": num_inputs}
    flops = 2 * case.num_rows * num_outputs * num_inputs
    expected = case.calls(case.baseline, num_weights=1)[0]()
    yield row(shared, dict(case.baseline), case.calls(case.baseline), None, flops, num_replays)
    for config in configs:
        yield row(shared, dict(table_config(config)), dense_calls(case, config), expected, flops, num_replays)


def dense_calls(case: LinearCase, config: TallConfig) -> Calls:
    """Of the kernel, on inputs and weights as LinearCase makes them."""
    generator = torch.Generator("cuda").manual_seed(0)
    num_outputs, num_inputs = case.sizes
    activation = "silu" if case.op == "gated_linear" else None
    x = torch.randn(case.num_rows, num_inputs, device="cuda", generator=generator).bfloat16()
    weights = torch.empty(num_copies(case.read_bytes), num_outputs, num_inputs, device="cuda", dtype=torch.bfloat16)
    weights[0].normal_(0, num_inputs**-0.5, generator=generator)
    weights[1:].copy_(weights[0])
    call = partial(tall_linear, x, activation=activation, config=config)
    return [partial(call, weights[i % len(weights)]) for i in range(4)]


def row(
    shared: dict[str, object],
    config: dict[str, object],
    calls: Calls,
    expected: torch.Tensor | None,
    flops: int,
    num_replays: int,
) -> dict[str, object]:
    """What was measured of `calls`. The exit is at once where the first one's result is not `expected`."""
    error = 0.0
    if expected is not None:
        error = ((calls[0]().float() - expected.float()).norm() / expected.float().norm()).item()
    if not error < ALLOWED_ERROR:
        raise SystemExit(f"{shared}, {config}: off by {error:.1e}, relative: its time means nothing")
    time_us = time_in_graph(calls, num_replays=num_replays)
    return shared | {
        "time_us": round(time_us, 1),
        "tflop_s": round(flops / time_us / 1e6, 1),
        "error": round(error, 6),
        "config": config,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 2048, 1024, 512])
    parser.add_argument("--replays", type=int, default=20, help="of each graph")
    parser.add_argument("--configs", type=json.loads, help="a JSON list, in place of those that tune would try")
    args = parser.parse_args()
    chosen = args.configs or [{"most_pairs": most_pairs, "num_stages": num_stages} for most_pairs, num_stages in TALL_STREAMS]
    configs = [TallConfig(**config) for config in chosen]
    for case in moe_cases(["qwen3-30b-a3b"], args.tokens):
        for measured in expert_rows(case, configs, args.replays):
            print(json.dumps(measured), flush=True)
        torch.cuda.empty_cache()
    for op, sizes in DENSE:
        for measured in dense_rows(LinearCase(op, sizes, max(args.tokens)), configs[:1], args.replays):
            print(json.dumps(measured), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
