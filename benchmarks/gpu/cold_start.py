"""The first start of an engine on a machine: what is compiled when, and how long it takes until the first token.

Each start is a process of its own. A cold one has caches of its own and empty, a warm one those of the cold one before it.
`one-by-one` starts without the rehearsal (workers/rehearsal.py): kernels are compiled as they are launched. A JSON row a start.
Its time line, in seconds since the process began, has a line for each compilation (kernel, seconds, thread).

    python benchmarks/gpu/cold_start.py [--shapes qwen3-8b,...] [--ways one-by-one,ahead] [--timelines FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import wraps
from itertools import product
from pathlib import Path
from typing import IO, Any

TIMEOUT_S = 120.0  # of a start
WAYS = ("one-by-one", "ahead")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", default="qwen3-8b", type=lambda text: text.split(","))
    parser.add_argument("--ways", default=",".join(WAYS), type=lambda text: text.split(","), help="each starts cold, then warm")
    parser.add_argument("--timelines", type=Path, default=Path(os.devnull), metavar="FILE", help="where to write them")
    parser.add_argument("--start", choices=WAYS, help=argparse.SUPPRESS)  # in the process of one start
    args = parser.parse_args()
    if args.start is not None:
        print(json.dumps(start_engine(args.shapes[0], args.start)))
        return
    with args.timelines.open("w") as timelines:
        for shape, way in product(args.shapes, args.ways):
            with tempfile.TemporaryDirectory(prefix="cold-start-") as caches:
                for state in ("cold", "warm"):
                    start_in_process(shape, way, state, Path(caches), timelines)


def start_in_process(shape: str, way: str, state: str, caches: Path, timelines: IO[str]) -> None:
    places = {"TRITON_CACHE_DIR": str(caches / "triton"), "PILOTFISH_CACHE": str(caches / "pilotfish")}
    command = [sys.executable, __file__, "--shapes", shape, "--start", way]
    done = subprocess.run(command, env=os.environ | places, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    events = result.pop("events")
    row = json.dumps({"shape": shape, "way": way, "state": state, **result})
    print(row, flush=True)
    print(row, *events, sep="\n", file=timelines, flush=True)


def start_engine(shape: str, way: str) -> dict[str, Any]:
    """Starts one as `pilotfish bench latency` does, up to its first token."""
    from pilotfish.cli.bench_engine import BenchEngine, seconds_since_process_start

    timeline = Timeline(seconds_since_process_start)
    timeline.note("imported")
    from pilotfish.common.config import EngineConfig, ModelConfig, ParallelConfig
    from pilotfish.workers import runner_setup

    timeline.watch()
    if way == "one-by-one":
        runner_setup.compile_kernels = lambda *_, **__: None
    else:
        runner_setup.compile_kernels = timeline.timed("rehearsal", runner_setup.compile_kernels, lambda *_: "and compile_all")
    model = ModelConfig(model=f"dummy:{shape}", max_model_len=1024)
    config = EngineConfig(
        max_num_seqs=128,
        max_num_batched_tokens=8192,
        kv_memory_fraction=0.9,
        prefix_caching=False,
        stall_timeout_s=600.0,
    )
    with BenchEngine(model, config, ParallelConfig(), seed=0) as engine:
        engine.run(1, input_len=512, output_len=1)
        start_s = seconds_since_process_start()
        timeline.note("first token")
    return {"start_s": round(start_s, 2), **timeline.totals(), "events": timeline.lines()}


class Timeline:
    """What happened when, in seconds of `clock`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._events: list[tuple[float, str]] = []
        self._compiled: dict[str, list[float]] = {}  # kind to seconds of each

    def note(self, text: str) -> None:
        self._events.append((self._clock(), text))

    def watch(self) -> None:
        """From here on notes what is compiled and what pilotfish logs."""
        from pilotfish.kernels.cuda import loader
        from pilotfish.workers import rehearsal
        from triton import knobs
        from triton.runtime import build

        knobs.compilation.listener = self._on_triton
        loader.compile_source = self.timed("nvrtc", loader.compile_source, lambda _, name, options: f"{name} {options[2:]}")
        rehearsal.compile_all = self.timed("compile_all", rehearsal.compile_all, lambda noted: f"of {len(noted)} kernels")
        build._build = self.timed("gcc", build._build, lambda name, *_: name)
        handler = logging.Handler()
        handler.emit = lambda record: self.note(f"log: {record.getMessage()}")  # type: ignore[method-assign]
        logger = logging.getLogger("pilotfish")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)

    def totals(self) -> dict[str, str]:
        return {kind: f"{len(spent)} in {sum(spent):.1f} s of threads" for kind, spent in sorted(self._compiled.items())}

    def lines(self) -> list[str]:
        return [f"{at_s:6.2f} {text}" for at_s, text in sorted(self._events)]

    def _on_triton(self, *, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        stages_s = {name: us / 1e6 for name, us in times.lowering_stages}
        spent_s = (times.ir_initialization + times.total_lowering + times.store_results) / 1e6
        kind = "triton found" if cache_hit else "triton"
        detail = " ".join(f"{name} {seconds:.2f}" for name, seconds in stages_s.items())
        self._add(kind, f"{src.fn.__name__} {detail}", spent_s)

    def timed(self, kind: str, function: Callable[..., Any], describe: Callable[..., str]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._add(kind, describe(*args), time.perf_counter() - start_s)

        return timed

    def _add(self, kind: str, what: str, spent_s: float) -> None:
        self._compiled.setdefault(kind, []).append(spent_s)
        self.note(f"{kind}: {what}, {spent_s:.2f} s on {threading.current_thread().name}")


if __name__ == "__main__":
    main()
