"""A step's head and draw on this GPU: the race in the head, against all logits and a race over them.

    python benchmarks/gpu/bench_head.py --shapes qwen3-8b --rows 8,128

One JSON row for each head, number of rows and kind of rows (greedy, sampled, top_p, mixed): microseconds that both add to a
step in a CUDA graph, between norms. The config is the tuned table's; where it has none, or chose all logits, the fastest
candidate for sampled rows, so that what the table refuses can be seen. To fill the table: python -m pilotfish.kernels.tune
--layers head.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import torch
from pilotfish.kernels import tuning
from pilotfish.kernels.tune import add_case_arguments, chosen_head_cases, time_in_step
from pilotfish.kernels.tune_head import SAMPLING, HeadCase
from pilotfish.kernels.tuning import Config


def choose_config(case: HeadCase) -> tuple[Config, bool]:
    """(config, whether it is the table's)."""
    device = torch.device("cuda", torch.cuda.current_device())
    config = tuning.lookup(case.op, torch.bfloat16, case.sizes, case.num_rows, device)
    if config is not None and config["kernel"] != "logits":
        return config, True
    return min(case.candidates(), key=lambda candidate: time_in_step(case, candidate)), False


def measure(case: HeadCase, config: Config, *, is_tuned: bool) -> dict[str, object]:
    logits_us, race_us = time_in_step(case, case.baseline), time_in_step(case, config)
    return {
        "outputs": case.sizes[0],
        "inputs": case.sizes[1],
        "rows": case.num_rows,
        "kind": case.kind,
        "logits_us": round(logits_us, 2),
        "race_us": round(race_us, 2),
        "speedup": round(logits_us / race_us, 3),
        "tb_s": round(case.read_bytes / race_us / 1e6, 2),
        "is_tuned": is_tuned,
        "config": dict(config),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_arguments(parser)
    args = parser.parse_args()
    args.rows = args.rows or [1, 8, 32, 128]
    for case in chosen_head_cases(args):
        config, is_tuned = choose_config(case)
        for kind in SAMPLING:
            print(json.dumps(measure(replace(case, kind=kind), config, is_tuned=is_tuned)), flush=True)


if __name__ == "__main__":
    main()
