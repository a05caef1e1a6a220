"""Which request killed its replica, found out without ending those beside it.

A replica that dies takes all its requests along, and any of them may be the cause: each has failed once more. `clear_tokens`
new tokens on one replica, or its end, clear a request. Suspects run apart: one that has k failures left before the last one
shares its replica with fewer than `group_size ** k` others like it, so that the next death tells more. One whose next failure
is the last is on trial: it is the only suspect there, and nothing else is sent there until it is cleared. It ends if it fails
once more. So a request that kills every replica costs `max_attempts` of them, and who was beside it goes on.

Replicas may die for other reasons, so often that one which has nothing to do with it meets `max_attempts` of them in a row. But
then others die without it, too. A request that saw that since it first failed, the deaths of those that were found guilty left
out, is tried on up to twice as many, each time alone: who kills them gets through none of these trials.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class _Suspect:
    """`replica` is where it runs; empty while it waits. `num_tokens` are those of this run. `deaths_before`: deaths that nobody
    was found guilty of, before its first failure."""

    deaths_before: int
    num_failures: int = 0
    replica: str = ""
    num_tokens: int = 0


@dataclass(slots=True)
class Suspects:
    """See the module. Requests that never failed are not kept, and may run wherever nobody is on trial."""

    max_attempts: int
    group_size: int = 8
    clear_tokens: int = 8
    _num_deaths: int = 0
    _is_same_death: bool = False
    _suspects: dict[str, _Suspect] = field(default_factory=dict)
    _present: dict[str, dict[str, None]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether anybody is suspected."""
        return bool(self._suspects)

    def num_failures(self, request_id: str) -> int:
        suspect = self._suspects.get(request_id)
        return suspect.num_failures if suspect else 0

    def fail(self, request_id: str) -> bool:
        """Its replica has died; calls without a `join` between them are of one death. False: it is found guilty, and ends."""
        self.leave(request_id)
        suspect = self._suspects.setdefault(request_id, _Suspect(self._num_deaths - self._is_same_death))
        suspect.num_failures += 1
        self._num_deaths += not self._is_same_death
        self._is_same_death = True
        others_die = self._num_deaths - suspect.deaths_before > suspect.num_failures
        if suspect.num_failures < self.max_attempts * (2 if others_die else 1):
            return True
        self._num_deaths -= 1
        return False

    def may_join(self, num_failures: int, replica: str) -> bool:
        """Whether a request that has failed so often may be sent to a replica."""
        present = self._present.get(replica)
        if not present:
            return True
        limit = min(self._limit(self._suspects[other].num_failures) for other in present)
        if not num_failures:
            return limit > 1
        return len(present) < min(limit, self._limit(num_failures))

    def join(self, request_id: str, replica: str) -> None:
        """It is sent to a replica."""
        self._is_same_death = False
        suspect = self._suspects.get(request_id)
        if suspect is not None:
            suspect.replica, suspect.num_tokens = replica, 0
            self._present.setdefault(replica, {})[request_id] = None

    def leave(self, request_id: str) -> None:
        """It does not run there any more; what it is suspected of stays."""
        suspect = self._suspects.get(request_id)
        if suspect is not None and suspect.replica:
            present = self._present[suspect.replica]
            del present[request_id]
            if not present:
                del self._present[suspect.replica]
            suspect.replica = ""

    def progress(self, request_id: str, num_tokens: int) -> None:
        """It has produced tokens, which may clear it."""
        suspect = self._suspects.get(request_id)
        if suspect is not None:
            suspect.num_tokens += num_tokens
            if suspect.num_tokens >= self.clear_tokens:
                self.clear(request_id)

    def clear(self, request_id: str) -> None:
        """It is not suspected any more, or has ended."""
        self.leave(request_id)
        self._suspects.pop(request_id, None)

    def _limit(self, num_failures: int) -> int:
        """Suspects on one replica where one has failed so often."""
        num_left = self.max_attempts - num_failures
        return int(self.group_size ** min(max(num_left - 1, 0), 8))
