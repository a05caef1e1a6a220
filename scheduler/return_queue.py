"""Those that have lost their replica, or were sent back, and wait for another: who has failed most often first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class ReturnQueue(Generic[T]):
    """A line for each number of failures, each in the order of arrival."""

    def __init__(self) -> None:
        self._lines: dict[int, dict[T, None]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __contains__(self, item: T) -> bool:
        return any(item in line for line in self._lines.values())

    def __iter__(self) -> Iterator[T]:
        for num_failures in sorted(self._lines, reverse=True):
            yield from self._lines[num_failures]

    def append(self, item: T, *, num_failures: int = 0) -> None:
        self._lines.setdefault(num_failures, {})[item] = None

    def extend(self, items: Iterable[T]) -> None:
        """Of those who never failed."""
        for item in items:
            self.append(item)

    def remove(self, item: T) -> None:
        """One that is not there is ignored."""
        for num_failures, line in self._lines.items():
            if item in line:
                del line[item]
                if not line:
                    del self._lines[num_failures]
                return

    def pop(self, may_start: Callable[[int], bool] = lambda _num_failures: True) -> T | None:
        """The first of the line of most failures among those for which `may_start(num_failures)`; None: nobody may."""
        for num_failures in sorted(self._lines, reverse=True):
            if may_start(num_failures):
                item = next(iter(self._lines[num_failures]))
                self.remove(item)
                return item
        return None
