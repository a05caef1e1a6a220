"""What commands that run for long say and hear on a terminal."""

from __future__ import annotations

import signal
import sys
from types import FrameType


def say(text: str) -> None:
    """Progress goes to standard error: standard output has only what was asked for."""
    print(text, file=sys.stderr, flush=True)


def end_as_with_ctrl_c() -> None:
    """From now on SIGTERM does what Ctrl-C does."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
