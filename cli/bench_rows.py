"""Where a benchmark's results go: rows on standard output and in a file, progress on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

from ..common.errors import ConfigError


class Rows:
    """`plotted` collects, of each row, what a plot needs beside it: (row, series by name)."""

    def __init__(self, file: TextIO | None) -> None:
        self._file = file
        self.plotted: list[tuple[dict[str, Any], Mapping[str, Any]]] = []

    def write(self, row: Mapping[str, Any], **series: Any) -> None:
        """Prints a row; floats keep six significant digits."""
        rounded = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}
        line = json.dumps(rounded)
        print(line, flush=True)
        if self._file is not None:
            print(line, file=self._file, flush=True)
        self.plotted.append((rounded, series))

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def open_rows(path: str | None) -> Iterator[Rows]:
    """Rows that go to `path` too. ConfigError if it cannot be written, before anything was measured."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "w", encoding="utf-8")) if path is not None else None
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error
        yield Rows(file)
