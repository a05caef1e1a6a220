"""The plots of `pilotfish bench --plot`, one for each workload. matplotlib is loaded when one is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from ..common.errors import ConfigError

_NUM_BINS = 50
Plotted = Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]


def require_matplotlib() -> None:
    """ConfigError that says how to get it; called before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'pilotfish[bench]'")


def draw(workload: str, plotted: Plotted, path: str) -> None:
    """Draws the rows of a workload into `path`, whose ending says the format.

    Raises:
        ConfigError: the file cannot be written, or its ending names no format.
    """
    from matplotlib.figure import Figure  # an optional extra

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    {"latency": _draw_latency, "throughput": _draw_throughput, "serve": _draw_serve}[workload](figure.subplots(), plotted)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the plot {path}: {error}") from error


def _draw_latency(axes: Any, plotted: Plotted) -> None:
    rows = sorted((row for row, _ in plotted if "tpot_ms" in row), key=lambda row: row["batch"])
    batches = [row["batch"] for row in rows]
    axes.plot(batches, [row["tpot_ms"] for row in rows], marker="o", label="measured")
    axes.plot(batches, [row["roofline_tpot_ms"] for row in rows], marker=".", linestyle="--", label="roofline")
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set(xlabel="batch", ylabel="TPOT, ms", title=_title(rows[0]), ylim=(0, None))
    axes.legend()


def _draw_throughput(axes: Any, plotted: Plotted) -> None:
    row, series = plotted[0]
    width_s = row["elapsed_s"] / _NUM_BINS
    tokens = [0.0] * _NUM_BINS
    for second, number in series["token_times"]:
        tokens[min(int(second / width_s), _NUM_BINS - 1)] += number
    axes.step([bin_ * width_s for bin_ in range(_NUM_BINS)], [number / width_s for number in tokens], where="post")
    axes.axhline(row["output_tok_s"], linestyle="--", label=f"mean {row['output_tok_s']:.0f}")
    axes.set(xlabel="seconds", ylabel="output tokens a second", title=_title(row), ylim=(0, None))
    axes.legend()


def _draw_serve(axes: Any, plotted: Plotted) -> None:
    row, series = plotted[0]
    for name, values in series.items():
        ordered = sorted(values)
        axes.plot(ordered, [(rank + 1) / len(ordered) for rank in range(len(ordered))], label=name)
    axes.set_xscale("log")
    axes.set(xlabel="milliseconds", ylabel="share of requests (ITL: of messages)", ylim=(0, 1))
    axes.set_title(f"{row['protocol']}, {row['num_prompts']} requests at {row['request_rate']} a second")
    axes.legend()


def _title(row: Mapping[str, Any]) -> str:
    return f"{row['model']}, {row['device']}, {row['input_len']} in, {row['output_len']} out"
