"""Whether a step takes as long after ten seconds as after one: times of the engine's own loop beside clocks, power and heat.

`bench latency` runs for seconds on end, the time line and other short measurements do not; where they disagree, this says when
the difference comes. One JSON row a second and batch size: milliseconds a step (mean, slowest), and what nvidia-smi reports.

    python benchmarks/gpu/sustained_steps.py --shape qwen3-8b [--batch-sizes 1,32] [--context 640] [--seconds 10]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time

from step_timeline import abort_all, make_loop, prefill_all

_QUERY = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "power_w": "power.draw", "gpu_c": "temperature.gpu"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="qwen3-8b")
    parser.add_argument("--batch-sizes", default="1,32", type=lambda text: [int(size) for size in text.split(",")])
    parser.add_argument("--context", type=int, default=640, help="prompt tokens of each sequence; steps add to them")
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--max-steps", type=int, default=3000, help="of a batch size; the sequences must have room for them")
    args = parser.parse_args()
    args.prefill = False
    loop, produced = make_loop(args, max_tokens=args.max_steps)
    for batch_size in args.batch_sizes:
        prefill_all(loop, produced, batch_size, args, max_tokens=args.max_steps)
        for second in range(1, args.seconds + 1):
            times_ms = []
            end_s = time.perf_counter() + 1.0
            while (start_s := time.perf_counter()) < end_s and min(produced.values()) < args.max_steps - 2:
                loop.advance()
                times_ms.append((time.perf_counter() - start_s) * 1e3)
            if not times_ms:
                break
            row = {"shape": args.shape, "batch": batch_size, "second": second, "steps": len(times_ms)}
            row |= {"mean_ms": round(sum(times_ms) / len(times_ms), 3), "slowest_ms": round(max(times_ms), 3)}
            print(json.dumps(row | card_state()), flush=True)
        abort_all(loop, produced)


def card_state() -> dict[str, float | None]:
    """Clocks, power and temperature now; None where there is no nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return dict.fromkeys(_QUERY)
    command = [tool, f"--query-gpu={','.join(_QUERY.values())}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()[0]
    return {name: float(value) for name, value in zip(_QUERY, answer.split(","), strict=True)}


if __name__ == "__main__":
    main()
