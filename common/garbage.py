"""How the garbage collector is set in a process that serves."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_YOUNG_OBJECTS = 10_000


def settle() -> None:
    """To be called once what a process needs for its whole life is there: nothing of that is looked at again.

    A full collection would otherwise stop a controller for a tenth of a second, to find that its modules are still in use.
    Young objects are collected by the ten thousand: most of those of a request have gone by then without the collector.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 20, 20)


@contextmanager
def imports() -> Iterator[None]:
    """Around imports of much: the collector neither follows them, a fifth of their time, nor looks at what they made later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
