"""`pilotfish status --watch`: the cluster as a table that is drawn again and again, until Ctrl-C.

On a terminal each frame is one write over the one before it, so nothing flickers. Elsewhere (a pipe, a file) each look is
appended as rows, for tail and grep.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TextIO

from ..client import Client, ClusterState
from ..common.errors import Unavailable

_HIDE_CURSOR, _SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
_HOME, _CLEAR_LINE, _CLEAR_BELOW, _CLEAR_ALL = "\x1b[H", "\x1b[K", "\x1b[J", "\x1b[2J"
HEADS = ("REPLICA", "STATE", "RUNNING", "WAITING", "KV USED", "TOKENS/S", "RESTARTS")


def watch(client: Client, *, interval_s: float, out: TextIO = sys.stdout) -> int:
    """Draw until Ctrl-C, which is a good end: 0. A server that does not answer is shown as such and asked again.

    Raises:
        PilotfishError: the server did not answer the first time, or refuses.
    """
    on_terminal = out.isatty()
    try:
        if on_terminal:
            out.write(_HIDE_CURSOR + _HOME + _CLEAR_ALL)
        for number, (lines, stamp) in enumerate(_looks(client, interval_s)):
            out.write(_frame(lines) if on_terminal else _rows(lines, stamp, with_heads=number == 0))
            out.flush()
    except KeyboardInterrupt:
        return 0
    finally:
        if on_terminal:
            out.write(_SHOW_CURSOR + "\n")
            out.flush()
    raise AssertionError("a watch ends with Ctrl-C or an error")


def _looks(client: Client, interval_s: float) -> Iterator[tuple[list[str], str]]:
    """The lines of each look, and its time of day."""
    before: ClusterState | None = None
    while True:
        try:
            state = client.status()
            lines, before = table(state, before), state
        except Unavailable as error:
            if before is None:
                raise
            lines = [f"no answer: {error.message}"]
        yield lines, time.strftime("%H:%M:%S")
        time.sleep(interval_s)


def table(state: ClusterState, before: ClusterState | None) -> list[str]:
    """A summary line, the heads, and a row for each replica. Rates are since `before`, over the controller's own clock."""
    summary = (
        f"{state.model}: {state.num_queued} queued, {state.num_running} running, "
        f"{_rate(state, before):.1f} tokens/s, cache hits {_hit_percent(state, before)}, "
        f"{state.num_requests} requests, {state.num_restarts} restarts"
    )
    rows = [HEADS]
    for replica in state.replicas:
        load = replica.load
        num_blocks = load.num_used_blocks + load.num_cached_blocks + load.num_free_blocks
        rows.append(
            (
                replica.name,
                replica.state.value,
                str(load.num_running),
                str(load.num_waiting),
                f"{100 * load.num_used_blocks / num_blocks:.0f} %" if num_blocks else "-",
                f"{_rate(state, before, replica.name):.1f}",
                str(replica.restarts),
            )
        )
    return [summary, *_columns(rows)]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) if index < 2 else cell.rjust(width) for index, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]


def _rate(state: ClusterState, before: ClusterState | None, replica: str | None = None) -> float:
    """Tokens a second, of one replica or all; 0 over the start of a new controller, whose counts begin anew."""
    elapsed_s = state.uptime_s - before.uptime_s if before is not None else 0.0
    if before is None or elapsed_s <= 0:
        return 0.0
    return max(0.0, (_generated(state, replica) - _generated(before, replica)) / elapsed_s)


def _generated(state: ClusterState, replica: str | None) -> int:
    if replica is None:
        return state.num_generated_tokens
    return sum(place.num_generated_tokens for place in state.replicas if place.name == replica)


def _hit_percent(state: ClusterState, before: ClusterState | None) -> str:
    """Of the prompt tokens since `before`; where there were none, or nothing to compare with, since the start."""
    prompt, cached = state.num_prompt_tokens, state.num_cached_tokens
    if before is not None and prompt > before.num_prompt_tokens:
        prompt, cached = prompt - before.num_prompt_tokens, cached - before.num_cached_tokens
    return f"{100 * cached / prompt:.0f} %" if prompt else "-"


def _frame(lines: Sequence[str]) -> str:
    """Over the last frame, from the top: no line is longer than the terminal is wide, no frame higher than it."""
    width, height = shutil.get_terminal_size()
    shown = [line[:width] + _CLEAR_LINE for line in lines[: max(1, height - 1)]]
    return _HOME + "\r\n".join(shown) + _CLEAR_BELOW


def _rows(lines: Sequence[str], stamp: str, *, with_heads: bool) -> str:
    if len(lines) == 1:
        return f"{stamp}  {lines[0]}\n"
    summary, heads, *replicas = lines
    shown = [*([f"{'TIME':8}  {heads}"] if with_heads else []), *(f"{stamp}  {row}" for row in replicas), f"{stamp}  {summary}"]
    return "\n".join(shown) + "\n"
