"""Ctrl-C, kept away from what must not be cut in half.

Python raises KeyboardInterrupt between any two instructions of the main thread. Within a Condition's own methods that leaves
its lock held, and whoever needs it next waits for ever; between two changes that belong together it leaves one undone.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self


class Uninterrupted:
    """A short block at whose end a Ctrl-C that came meanwhile is handled, as it would have been. Of use on the main thread.

    `on_interrupt` is told at once: it ends a wait inside the block. It runs between two instructions of it, so it may take no
    lock.
    """

    def __init__(self, on_interrupt: Callable[[], object] = lambda: None) -> None:
        self._on_interrupt = on_interrupt
        self._original: Callable[[int, FrameType | None], object] | None = None
        self._came = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            original = signal.getsignal(signal.SIGINT)
            if callable(original):
                self._original = original
                signal.signal(signal.SIGINT, self._keep)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._original is not None:
            signal.signal(signal.SIGINT, self._original)
            if self._came:
                self._original(signal.SIGINT, None)

    def _keep(self, _signal: int, _frame: FrameType | None) -> None:
        self._came = True
        self._on_interrupt()
