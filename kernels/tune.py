"""Measures the kernels that could serve an op on this machine's GPU and keeps the best in its table (tuning.py).

    python -m pilotfish.kernels.tune --shapes qwen3-8b,qwen3-0.6b --nk 6144x4096 --rows 1,8,32

Prints one JSON row for each op, shape and number of rows. Every candidate's result is compared with the baseline's before it
is timed. Candidates are compiled first, by several processes, into Triton's cache on disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
import triton

from .graph_timing import time_in_graph
from .tune_linear import ROWS, SHAPES, LinearCase, linear_cases
from .tuning import Config, Entry, row_bucket, save_entries, table_path

# A candidate must save this share of the baseline's time: less is noise, and another way to round.
WORTHWHILE = 0.02


class Case(Protocol):
    """One shape of one op: what to compare. Picklable."""

    @property
    def op(self) -> str: ...
    @property
    def sizes(self) -> tuple[int, ...]: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def read_bytes(self) -> int:
        """What one call must read, mostly weights."""
        ...

    @property
    def baseline(self) -> Config: ...
    def candidates(self) -> list[Config]: ...
    def calls(self, config: Config | None, *, num_weights: int | None = None) -> list[Callable[[], torch.Tensor]]:
        """Calls that rotate through weights beyond L2; with `num_weights` one call on so few."""
        ...


def measure(case: Case) -> Entry:
    """The fastest right config of a case. Its dtype is bfloat16."""
    expected = case.calls(case.baseline, num_weights=1)[0]().float()
    baseline_us = time_in_graph(case.calls(case.baseline))
    best_us, best = baseline_us * (1 - WORTHWHILE), None
    for config in case.candidates():
        _check_agrees(case.calls(config, num_weights=1)[0]().float(), expected, case, config)
        time_us = time_in_graph(case.calls(config))
        if time_us < best_us:
            best_us, best = time_us, config
    return Entry(
        op=case.op,
        dtype="bfloat16",
        sizes=case.sizes,
        num_rows=row_bucket(case.num_rows),
        config=best or case.baseline,
        time_us=round(best_us if best else baseline_us, 2),
        baseline_us=round(baseline_us, 2),
    )


def _check_agrees(y: torch.Tensor, expected: torch.Tensor, case: Case, config: Config) -> None:
    """RuntimeError where two ways to round bfloat16 do not explain the difference."""
    error = ((y - expected).norm() / expected.norm()).item()
    if not error < 1e-2:
        raise RuntimeError(f"{case.op} {case.sizes} of {case.num_rows} rows: {dict(config)} is off by {error:.1e}, relative")


def compile_all(cases: Sequence[Case], *, num_processes: int) -> None:
    """Runs every candidate once in other processes, so that this one finds it in the cache."""
    jobs = [(case, config) for case in cases for config in case.candidates()]
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, *zip(*jobs, strict=True), chunksize=1 + len(jobs) // (4 * num_processes)))


def _compile(case: Case, config: Config) -> None:
    case.calls(config, num_weights=1)[0]()


def describe(case: Case, entry: Entry) -> str:
    """The JSON row of a measured case. TB/s are of what must be read."""
    row = {
        "op": entry.op,
        "sizes": entry.sizes,
        "rows": case.num_rows,
        "time_us": entry.time_us,
        "tb_s": round(case.read_bytes / entry.time_us / 1e6, 2),
        "baseline_us": entry.baseline_us,
        "speedup": round(entry.baseline_us / entry.time_us, 2),
        "config": dict(entry.config),
    }
    return json.dumps(row)


def parse_sizes(text: str) -> tuple[int, int]:
    """(N, K) of "6144x4096"."""
    try:
        num_outputs, num_inputs = (int(number) for number in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not OUTPUTSxINPUTS, such as 6144x4096") from None
    return num_outputs, num_inputs


def parse_shapes(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SHAPES:
            raise argparse.ArgumentTypeError(f"{name!r} is not known: use some of {','.join(SHAPES)}")
    return names


def parse_rows(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """What chooses the cases, here and in benchmarks."""
    parser.add_argument("--shapes", type=parse_shapes, help="models whose layers to measure; all, if there is no --nk")
    parser.add_argument("--nk", type=parse_sizes, nargs="*", default=[], help="more layers, OUTPUTSxINPUTS")
    parser.add_argument("--rows", type=parse_rows, default=list(ROWS), help="numbers of rows, such as 1,8,32")


def chosen_cases(args: argparse.Namespace) -> list[LinearCase]:
    """The cases of add_case_arguments' arguments."""
    shapes = args.shapes or ([] if args.nk else list(SHAPES))
    return linear_cases(shapes, args.nk, args.rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_arguments(parser)
    parser.add_argument("--out", type=Path, help="the table to write; by default this GPU's in the package")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8), help="that compile")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA device: a table is measured on the GPU it is for")
    gpu_name = torch.cuda.get_device_name()
    cases = chosen_cases(args)
    compile_all(cases, num_processes=args.processes)
    entries = []
    for case in cases:
        entries.append(measure(case))
        print(describe(case, entries[-1]), flush=True)
    measured_on = {"gpu": gpu_name, "torch": torch.__version__, "triton": triton.__version__}
    save_entries(args.out or table_path(gpu_name), entries, measured_on=measured_on)
    return 0


if __name__ == "__main__":
    sys.exit(main())
