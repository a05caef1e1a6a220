"""Measures the kernels that could serve an op on this machine's GPU and keeps the best in its table (tuning.py).

    python -m pilotfish.kernels.tune --shapes qwen3-8b,qwen3-0.6b --nk 6144x4096 --rows 1,8,32
    python -m pilotfish.kernels.tune --shapes qwen3-8b --tensor-parallel 2
    python -m pilotfish.kernels.tune --kernels streaming,tall        # a new kernel against what the table has

Prints one JSON row for each op, shape and number of rows, and keeps it at once. Every candidate's result is compared with the
baseline's before it is timed: a wrong one is left out and named on stderr, and the exit status is 1. What this GPU has too
little shared memory for is left out. Candidates are compiled first, by several processes, into Triton's cache on disk.
Products of MANY_ROWS or more are timed on a card that has worked for HEAT_S: it holds its power limit then, as under a server's
load, and other kernels win there than in its first second.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import triton
from triton.runtime.errors import OutOfResources

from .graph_timing import time_in_graph
from .tune_head import HeadCase, head_cases
from .tune_layer import LAYER_ROWS, LayerCase, layer_cases
from .tune_linear import LINEAR_ROWS, ROWS, SHAPES, LinearCase, linear_cases
from .tune_moe import MOE_ROWS, MoeCase, moe_cases
from .tune_route import ROUTE_ROWS, RouteCase, route_cases
from .tuning import MANY_ROWS, Config, Entry, load_entries, row_bucket, save_entries, table_path

# A candidate must save this share of the baseline's time: less is noise, and another way to round.
WORTHWHILE = 0.02
# Largest |y - baseline| / |baseline|, in norms: two ways to round bfloat16 differ by a few 1e-3.
TOLERATED_ERROR = 1e-2
HEAT_S = 4.0


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
    @property
    def keeps_twin(self) -> bool:
        """Whether a config of CUDA C++ names the next best, for where that cannot be compiled. Otherwise a rule serves."""
        ...

    def candidates(self) -> list[Config]: ...
    def calls(self, config: Config | None, *, num_weights: int | None = None) -> list[Callable[[], torch.Tensor]]:
        """Calls that rotate through weights beyond L2; with `num_weights` one call on so few."""
        ...

    def neighbour(self) -> Callable[[], object] | None:
        """What a step runs between two such calls, so that it counts how early a kernel starts and lets the next one start."""
        ...


Job = tuple[Case, list[Config]]  # and what to compare it with


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The fastest right config of a case, and what is to be said of each wrong one."""

    entry: Entry
    faults: list[str]


def time_in_step(case: Case, config: Config) -> float:
    """Microseconds that a call adds to a step."""
    calls, neighbour = case.calls(config), case.neighbour()
    num_replays = 30 if case.num_rows >= MANY_ROWS else 7
    if neighbour is None:
        return time_in_graph(calls, num_replays=num_replays)
    with_neighbours = [each for call in calls for each in (call, neighbour)]
    both_us = 2 * time_in_graph(with_neighbours, num_replays=num_replays)
    return both_us - time_in_graph([neighbour] * len(calls), num_replays=num_replays)


def heat_up(case: Case) -> None:
    """Runs the baseline for HEAT_S."""
    calls = case.calls(case.baseline)
    replay_us = time_in_graph(calls) * len(calls)
    time_in_graph(calls, num_replays=math.ceil(HEAT_S * 1e6 / replay_us))


def measure(case: Case, configs: Sequence[Config] | None = None) -> Measured:
    """Compares configs, by default the candidates of the case, which are in bfloat16, with its baseline."""
    expected = case.calls(case.baseline, num_weights=1)[0]().float()
    if case.num_rows >= MANY_ROWS:
        heat_up(case)
    baseline_us = time_in_step(case, case.baseline)
    best_us, best = baseline_us * (1 - WORTHWHILE), None
    twin_us, twin = best_us, case.baseline  # for where CUDA C++ cannot be compiled
    faults = []
    for config in case.candidates() if configs is None else configs:
        y = _run_once(case, config)
        if y is None:
            continue
        error = ((y.float() - expected).norm() / expected.norm()).item()
        if not error < TOLERATED_ERROR:
            faults.append(f"{case.op} {case.sizes} of {case.num_rows} rows: {dict(config)} is off by {error:.1e}, relative")
            continue
        time_us = time_in_step(case, config)
        if time_us < best_us:
            best_us, best = time_us, config
        if time_us < twin_us and config["kernel"] != "streaming":
            twin_us, twin = time_us, config
    if best is not None and best["kernel"] == "streaming" and case.keeps_twin:
        best = {**best, "twin": twin}
    entry = Entry(
        op=case.op,
        dtype="bfloat16",
        sizes=case.sizes,
        num_rows=row_bucket(case.num_rows),
        config=best or case.baseline,
        time_us=round(best_us if best else baseline_us, 2),
        baseline_us=round(baseline_us, 2),
    )
    return Measured(entry=entry, faults=faults)


def configs_to_try(case: Case, kernels: Sequence[str] | None, known: Iterable[Entry]) -> list[Config]:
    """The candidates of a case; with `kernels` only theirs, beside what the known entries have for it."""
    if kernels is None:
        return case.candidates()
    kept: list[Config] = []
    for entry in known:
        if (entry.op, entry.sizes, entry.num_rows) == (case.op, case.sizes, row_bucket(case.num_rows)):
            kept += [{name: value for name, value in entry.config.items() if name != "twin"}]
            kept += [entry.config["twin"]] if "twin" in entry.config else []
    configs = kept + [config for config in case.candidates() if config["kernel"] in kernels]
    baseline = case.baseline
    return [config for i, config in enumerate(configs) if config != baseline and config not in configs[:i]]


def compile_all(jobs: Sequence[Job], *, num_processes: int) -> None:
    """Runs every config once in other processes, so that this one finds it in the cache.

    One that cannot be compiled raises when it is measured, in this process.
    """
    runs = [(case, config) for case, configs in jobs for config in configs]
    share = 1 + len(runs) // (4 * num_processes)
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for start in range(0, len(runs), share):
            pool.submit(_run_all, runs[start : start + share])


def _run_all(runs: Sequence[tuple[Case, Config]]) -> None:
    for case, config in runs:
        _run_once(case, config)


def _run_once(case: Case, config: Config) -> torch.Tensor | None:
    """The result; None where the config needs more shared memory or registers than this GPU has."""
    try:
        return case.calls(config, num_weights=1)[0]()
    except OutOfResources:
        return None


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
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="take one of N ranks' share of each layer")
    parser.add_argument("--rows", type=parse_rows, help="numbers of rows, such as 1,8,32; by default powers of two")


def chosen_linear_cases(args: argparse.Namespace) -> list[LinearCase]:
    """The linear layers of add_case_arguments' arguments."""
    return linear_cases(_shapes(args), args.nk, args.rows or LINEAR_ROWS, num_ranks=args.tensor_parallel)


def chosen_head_cases(args: argparse.Namespace) -> list[HeadCase]:
    """The heads of add_case_arguments' arguments."""
    return head_cases(_shapes(args), args.rows or ROWS, num_ranks=args.tensor_parallel)


def chosen_moe_cases(args: argparse.Namespace) -> list[MoeCase]:
    """The experts of add_case_arguments' arguments."""
    return moe_cases(_shapes(args), args.rows or MOE_ROWS, num_ranks=args.tensor_parallel)


def chosen_route_cases(args: argparse.Namespace) -> list[RouteCase]:
    """What comes before the experts, of add_case_arguments' arguments."""
    return route_cases(_shapes(args), args.rows or ROUTE_ROWS)


def chosen_layer_cases(args: argparse.Namespace) -> list[LayerCase]:
    """Layers behind their attention, of add_case_arguments' arguments; none on several ranks, which sum in between."""
    return layer_cases(_shapes(args) if args.tensor_parallel == 1 else [], args.rows or LAYER_ROWS)


def _shapes(args: argparse.Namespace) -> list[str]:
    return args.shapes or ([] if args.nk else list(SHAPES))


def parse_layers(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in LAYERS:
            raise argparse.ArgumentTypeError(f"{name!r} is not known: use some of {','.join(LAYERS)}")
    return names


LAYERS: dict[str, Callable[[argparse.Namespace], Sequence[Case]]] = {
    "linear": chosen_linear_cases,
    "head": chosen_head_cases,
    "moe": chosen_moe_cases,
    "route": chosen_route_cases,
    "layer": chosen_layer_cases,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_arguments(parser)
    parser.add_argument("--layers", type=parse_layers, default=list(LAYERS), help=f"kinds of layers, of {','.join(LAYERS)}")
    parser.add_argument("--kernels", type=lambda text: text.split(","), help="only these; the table's choices stay candidates")
    parser.add_argument("--out", type=Path, help="the table to write; by default this GPU's in the package")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8), help="that compile")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA device: a table is measured on the GPU it is for")
    gpu_name = torch.cuda.get_device_name()
    cases = [case for name in args.layers for case in LAYERS[name](args)]
    path = args.out or table_path(gpu_name)
    known = load_entries(path)
    jobs = [(case, configs_to_try(case, args.kernels, known)) for case in cases]
    jobs = [(case, configs) for case, configs in jobs if configs]
    measured_on = {"gpu": gpu_name, "torch": torch.__version__, "triton": triton.__version__}
    compile_all(jobs, num_processes=args.processes)
    is_right = True
    for case, configs in jobs:
        measured = measure(case, configs)
        save_entries(path, [measured.entry], measured_on=measured_on)
        print(describe(case, measured.entry), flush=True)
        for fault in measured.faults:
            print(fault, file=sys.stderr)
        is_right &= not measured.faults
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
