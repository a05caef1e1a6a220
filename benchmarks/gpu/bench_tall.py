"""The CUDA C++ kernel for many pairs an expert (kernels/tall_experts.py) against what serves the same products today.

    python benchmarks/gpu/bench_tall.py                      # experts of Qwen3-30B-A3B
    python benchmarks/gpu/bench_tall.py --tokens 8192 --replays 300 --configs '[{"most_pairs": 192, "num_stages": 3}]'

JSON rows: for each product and number of tokens one of the baseline (the tuned table's choice), then one for each config.
Microseconds of a call in a CUDA graph, over weights that have left L2 (the first product with its sorting, the second with its
sum), TFLOP/s, and the error relative to the baseline, in norms. Many --replays show what is left when the card has reached its
power limit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import torch
from pilotfish.kernels import tuning
from pilotfish.kernels.graph_timing import time_in_graph
from pilotfish.kernels.moe_config import table_config
from pilotfish.kernels.tall_experts import TALL_CONFIGS, TallConfig
from pilotfish.kernels.tune_moe import MoeCase, moe_cases

ALLOWED_ERROR = 1e-2  # of norms: two ways to round bfloat16


def rows(case: MoeCase, configs: list[TallConfig], num_replays: int) -> Iterator[dict[str, object]]:
    """The baseline's row and those of the configs for one product. The exit is at once where a result is not the baseline's."""
    moe = case.moe
    chosen = tuning.lookup(
        case.op, torch.bfloat16, case.sizes, case.num_rows, torch.device("cuda", torch.cuda.current_device())
    )
    shared = {"op": case.op, "tokens": moe.num_tokens}
    flops = moe.num_tokens * moe.num_choices * moe.hidden * moe.intermediate * (4 if case.op == "moe_gate_up" else 2)
    baseline = chosen or case.baseline
    expected = case.calls(baseline, num_weights=1)[0]().float()
    for config in (baseline, *map(table_config, configs)):
        error = ((case.calls(config, num_weights=1)[0]().float() - expected).norm() / expected.norm()).item()
        if not error < ALLOWED_ERROR:
            raise SystemExit(f"{shared}, {dict(config)}: off by {error:.1e}, relative: its time means nothing")
        time_us = time_in_graph(case.calls(config), num_replays=num_replays)
        yield shared | {
            "time_us": round(time_us, 1),
            "tflop_s": round(flops / time_us / 1e6, 1),
            "error": round(error, 6),
            "config": dict(config),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 2048, 1024, 512])
    parser.add_argument("--replays", type=int, default=20, help="of each graph")
    parser.add_argument("--configs", type=json.loads, help="a JSON list, in place of those that tune would try")
    args = parser.parse_args()
    configs = list(TALL_CONFIGS) if args.configs is None else [TallConfig(**config) for config in args.configs]
    for case in moe_cases(["qwen3-30b-a3b"], args.tokens):
        for measured in rows(case, configs, args.replays):
            print(json.dumps(measured), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
