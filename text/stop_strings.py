"""Stop strings, matched over text as it grows, whatever way tokens cut it."""

from __future__ import annotations


class StopMatcher:
    """Finds the stop string that is complete first; of those that end together, the one that began first.

    Text that may be the beginning of a stop string is held back, and no more than that. After a match the matcher is done.
    """

    __slots__ = ("_held", "_include", "_longest", "_stop")

    def __init__(self, stop: tuple[str, ...], *, include: bool) -> None:
        self._stop = stop
        self._include = include
        self._longest = max(map(len, stop), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is safe to show, the stop string that matched or None). With a match, text after it is dropped."""
        if not self._stop:
            return text, None
        text = self._held + text
        best = self._first_match(text)
        if best is not None:
            start, stop = best
            self._held = ""
            return text[: start + len(stop) if self._include else start], stop
        keep = self._held_length(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """The text held back, when no more will follow."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        found = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if not found:
            return None
        _, start, stop = min(found)
        return start, stop

    def _held_length(self, text: str) -> int:
        """The longest suffix that begins some stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            suffix = text[len(text) - length :]
            if any(stop.startswith(suffix) for stop in self._stop):
                return length
        return 0
