"""Linear layers of few rows: what the ops choose on this GPU, against cuBLAS and the bandwidth of its memory.

    python benchmarks/gpu/bench_linear.py --shapes qwen3-8b --rows 1,8,32

One JSON row for each op, shape and number of rows. Calls run one after the other in a CUDA graph, over as many weights as leave
the L2 cache. The baseline is cuBLAS, followed by the activation's kernel where the op has one. Bytes are those of the weight.
To measure every candidate and keep the best: python -m pilotfish.kernels.tune, which takes the same arguments.
"""

from __future__ import annotations

import argparse
import json

from pilotfish.kernels.graph_timing import time_in_graph
from pilotfish.kernels.tune import add_case_arguments, chosen_linear_cases
from pilotfish.kernels.tune_linear import ROWS, LinearCase


def measure(case: LinearCase, bandwidth_tb_s: float) -> dict[str, object]:
    time_us = time_in_graph(case.calls(None))
    baseline_us = time_in_graph(case.calls(case.baseline))
    tb_s = case.read_bytes / time_us / 1e6
    return {
        "op": case.op,
        "outputs": case.sizes[0],
        "inputs": case.sizes[1],
        "rows": case.num_rows,
        "time_us": round(time_us, 2),
        "tb_s": round(tb_s, 2),
        "of_bandwidth": round(tb_s / bandwidth_tb_s, 3),
        "cublas_us": round(baseline_us, 2),
        "speedup": round(baseline_us / time_us, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_arguments(parser)
    parser.set_defaults(rows=ROWS)
    parser.add_argument("--bandwidth", type=float, default=4.28, help="TB/s this GPU reads; 4.28 was measured on an H200")
    args = parser.parse_args()
    for case in chosen_linear_cases(args):
        print(json.dumps(measure(case, args.bandwidth)), flush=True)


if __name__ == "__main__":
    main()
