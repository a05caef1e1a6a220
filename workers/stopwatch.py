"""Times the parts of a step on the device that runs it, without waiting for it.

On a GPU a pair of events brackets the queued work and is read when the step's result is; on a CPU the work has happened when
the bracket closes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up milliseconds by name over one step."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._event_pairs: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._total_ms: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str, *, since: torch.cuda.Event | None = None) -> Iterator[torch.cuda.Event | None]:
        """Counts the body's work under `name`; a body that raises is not counted. Yields what is recorded at its end, on a GPU.

        `since`: the end of the measure before, where nothing is between.
        """
        if self._on_gpu:
            end = torch.cuda.Event(enable_timing=True)
            if since is None:
                since = torch.cuda.Event(enable_timing=True)
                since.record()
            yield end
            end.record()
            self._event_pairs.append((name, since, end))
            return
        start_s = time.perf_counter()
        yield None
        self._add(name, (time.perf_counter() - start_s) * 1e3)

    def total_ms(self) -> dict[str, float]:
        """Milliseconds by name. On a GPU the measured work must be complete."""
        for name, start, end in self._event_pairs:
            self._add(name, start.elapsed_time(end))
        self._event_pairs.clear()
        return self._total_ms

    def _add(self, name: str, elapsed_ms: float) -> None:
        self._total_ms[name] = self._total_ms.get(name, 0.0) + elapsed_ms
