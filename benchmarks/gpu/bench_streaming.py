"""The CUDA C++ kernel for few rows (kernels/streaming_linear.py): its configs against cuBLAS and what the op chooses today.

    python benchmarks/gpu/bench_streaming.py --nk 4096x4096 --rows 2,8,32
    python benchmarks/gpu/bench_streaming.py --nk 4096x4096 --rows 8 --configs '[{"tile_n": 64, "split_k": 2, "num_stages": 9}]'

JSON rows: for each op, shape and number of rows one of the baseline (cuBLAS, then the activation's kernel), one of what the
op chooses, one for each config that `kernels.tune` would try, or for those given. Calls run one after the other in a CUDA
graph, over as many weights as leave the L2 cache. `error` is relative to the baseline, in norms.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

from pilotfish.kernels.graph_timing import time_in_graph
from pilotfish.kernels.streaming_linear import unfit_sizes
from pilotfish.kernels.tune import add_case_arguments, chosen_linear_cases
from pilotfish.kernels.tune_linear import LinearCase, streaming_configs
from pilotfish.kernels.tuning import Config


def measure(case: LinearCase, configs: list[Config], bandwidth_tb_s: float) -> Iterator[dict[str, object]]:
    expected = case.calls(case.baseline, num_weights=1)[0]().float()
    for name, config in [("baseline", case.baseline), ("chosen", None), *(("streaming", config) for config in configs)]:
        y = case.calls(config, num_weights=1)[0]().float()
        time_us = time_in_graph(case.calls(config))
        tb_s = case.read_bytes / time_us / 1e6
        yield {
            "op": case.op,
            "outputs": case.sizes[0],
            "inputs": case.sizes[1],
            "rows": case.num_rows,
            "what": name,
            "time_us": round(time_us, 2),
            "tb_s": round(tb_s, 2),
            "of_bandwidth": round(tb_s / bandwidth_tb_s, 3),
            "error": round(((y - expected).norm() / expected.norm()).item(), 6),
            "config": None if config is None else {key: value for key, value in config.items() if key != "kernel"},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_arguments(parser)
    parser.add_argument("--configs", type=json.loads, help="a JSON list of configs, in place of those that tune would try")
    parser.add_argument("--bandwidth", type=float, default=4.28, help="TB/s this GPU reads; 4.28 was measured on an H200")
    args = parser.parse_args()
    for case in chosen_linear_cases(args):
        num_outputs, num_inputs = case.sizes
        gated = case.op == "gated_linear"
        if args.configs is None:
            configs = streaming_configs(num_outputs, num_inputs, case.num_rows, gated=gated)
        else:
            configs = [{"kernel": "streaming", "early_start": True, **config} for config in args.configs]
        configs = [config for config in configs if unfit_sizes(config, case.num_rows, num_inputs, gated=gated) is None]
        for row in measure(case, configs, args.bandwidth):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
