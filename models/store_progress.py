"""How long work on models (downloads, conversions) reports itself, and the terminal's way of showing it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tqdm import tqdm


class Progress(Protocol):
    """Called with a phase's name and how much of it is done; a new name starts a new phase."""

    def __call__(self, phase: str, done: int, total: int, *, unit: str) -> None: ...


def no_progress(phase: str, done: int, total: int, *, unit: str) -> None:
    """For callers that show nothing."""


@contextmanager
def terminal_progress() -> Iterator[Progress]:
    """A bar for each phase on a terminal's stderr; where stderr is a file, one line for each phase."""
    bar: tqdm | None = None

    def show(phase: str, done: int, total: int, *, unit: str) -> None:
        nonlocal bar
        if bar is None or bar.desc != phase:
            if bar is not None:
                bar.close()
            if not sys.stderr.isatty():
                print(phase, file=sys.stderr, flush=True)
            columns = min(100, shutil.get_terminal_size().columns)  # a terminal that does not say its size has 80
            bar = tqdm(total=total, unit=unit, unit_scale=unit == "B", ncols=columns, disable=not sys.stderr.isatty())
            bar.desc = phase
        bar.total = total
        bar.n = done
        bar.refresh()

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()
