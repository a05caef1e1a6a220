"""Stands in for a GraphRecorder on the CPU: what it records is called again at each replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch


class Function:
    """Replays by calling; what the function returns is copied to where the recording left it."""

    def __init__(self, function: Callable[[], Any], replayed: list[Function]) -> None:
        self.function, self.result, self._replayed = function, function(), replayed

    def replay(self) -> None:
        self._replayed.append(self)
        for kept, new in zip(_tensors(self.result), _tensors(self.function()), strict=True):
            kept.copy_(new)


class FunctionRecorder:
    """`replayed`: every Function, as often as it was."""

    def __init__(self) -> None:
        self.replayed: list[Function] = []

    def warm_up(self, work: Callable[[], object]) -> None:
        work()

    def record(self, work: Callable[[], Any]) -> tuple[Function, Any]:
        function = Function(work, self.replayed)
        return function, function.result

    def release(self, result: torch.Tensor) -> torch.Tensor:
        return result


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif is_dataclass(result):
        for field in fields(result):
            yield from _tensors(getattr(result, field.name))
    elif result is not None:
        for part in result:
            yield from _tensors(part)
