"""The CUDA C++ kernels for many rows (kernels/tall_linear.py, tall_experts.py) against what serves the same products today.

    python benchmarks/gpu/bench_tall.py                      # layers of Qwen3-8B and experts of Qwen3-30B-A3B
    python benchmarks/gpu/bench_tall.py --shapes qwen3-8b --tokens 8192 --replays 300
    python benchmarks/gpu/bench_tall.py --configs '[{"kernel": "tall", "most_pairs": 96, "num_stages": 4}]'

JSON rows: for each product and number of tokens one of the baseline (the tuned table's choice), then one for each config.
Microseconds of a call in a CUDA graph, over weights that have left L2 (the first product of experts with its sorting, the
second with its sum), TFLOP/s, and the error relative to the baseline, in norms. Many --replays show what is left when the card
has reached its power limit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence

import torch
from pilotfish.kernels import tuning
from pilotfish.kernels.graph_timing import time_in_graph
from pilotfish.kernels.moe_config import table_config
from pilotfish.kernels.tall_experts import TALL_CONFIGS as EXPERT_CONFIGS
from pilotfish.kernels.tall_linear import TALL_CONFIGS as LINEAR_CONFIGS
from pilotfish.kernels.tune import parse_shapes
from pilotfish.kernels.tune_linear import LinearCase, linear_cases
from pilotfish.kernels.tune_moe import MoeCase, moe_cases
from pilotfish.kernels.tuning import Config

ALLOWED_ERROR = 1e-2  # of norms: two ways to round bfloat16


def num_flops(case: LinearCase | MoeCase) -> int:
    if isinstance(case, LinearCase):
        return 2 * case.num_rows * case.sizes[0] * case.sizes[1]
    moe = case.moe
    return moe.num_tokens * moe.num_choices * moe.hidden * moe.intermediate * (4 if case.op == "moe_gate_up" else 2)


def rows(case: LinearCase | MoeCase, configs: Sequence[Config], num_replays: int) -> Iterator[dict[str, object]]:
    """The baseline's row and those of the configs for one product. The exit is at once where a result is not the baseline's."""
    device = torch.device("cuda", torch.cuda.current_device())
    baseline = tuning.lookup(case.op, torch.bfloat16, case.sizes, case.num_rows, device) or case.baseline
    product = {"op": case.op, "sizes": case.sizes, "tokens": case.num_rows}
    expected = case.calls(baseline, num_weights=1)[0]().float()
    for config in (baseline, *configs):
        error = ((case.calls(config, num_weights=1)[0]().float() - expected).norm() / expected.norm()).item()
        if not error < ALLOWED_ERROR:
            raise SystemExit(f"{product}, {dict(config)}: off by {error:.1e}, relative: its time means nothing")
        time_us = time_in_graph(case.calls(config), num_replays=num_replays)
        yield product | {
            "time_us": round(time_us, 1),
            "tflop_s": round(num_flops(case) / time_us / 1e6, 1),
            "error": round(error, 6),
            "config": dict(config),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=parse_shapes, default=["qwen3-8b", "qwen3-30b-a3b"], help="models, by commas")
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 2048, 1024, 512])
    parser.add_argument("--replays", type=int, default=20, help="of each graph")
    parser.add_argument("--configs", type=json.loads, help="a JSON list, as in the table; by default what tune tries")
    args = parser.parse_args()
    linear = [case for case in linear_cases(args.shapes, [], args.tokens) if case.op != "linear_float32"]
    configs = args.configs or [*LINEAR_CONFIGS, *map(table_config, EXPERT_CONFIGS)]
    for case in (*linear, *moe_cases(args.shapes, args.tokens)):
        own = [config for config in configs if ("most_pairs" in config) == isinstance(case, MoeCase)]
        for measured in rows(case, own, args.replays):
            print(json.dumps(measured), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
