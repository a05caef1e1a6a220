"""How long a step takes: ms = overhead + ms_per_token * tokens, learned from the steps that replicas report.

One line is fitted to all replicas of a model (weighted least squares; old steps fade as others of their size come, so that
many decode steps do not outweigh the prefills between them), and each replica has a factor by which it is slower or faster
than the fleet is in steps of the same size, 1 until it has shown otherwise: a new replica is neither flooded nor starved, and
one that alone ran long prompts is not taken for a slow one. The line's slope is the prefill rate, its value at a batch's size
the time of a decode step. A step far from what was expected (a pause of the machine, a first compilation) counts only up to a
limit, so that one of them moves neither; a wide one while steps of its size are new.
"""

from __future__ import annotations

from dataclasses import dataclass, field

_FADE = 0.99  # weight of what a replica has shown, for each step that every other one has run since
_SIZE_FADE = 0.98  # weight of a step relative to the next one of about its size
_AVERAGE_STEPS = 10.0  # a replica counts as average until it has shown more steps than this
_OUTLIER = 3.0  # a step counts as at most so many times what its replica was expected to take
_FIRST_OUTLIER = 30.0  # while fewer than _FEW steps of its size were seen: the prior may be far off
_FEW = 3.0
_FORGOTTEN = 1e-3  # weight below which a replica has shown nothing of a size
_PRIOR_TOKENS = 1024.0
_PRIOR_WEIGHT = 0.1


@dataclass(frozen=True, slots=True)
class StepTime:
    """Estimated cost of a step on one replica; both positive."""

    overhead_ms: float
    ms_per_token: float

    def step_ms(self, num_tokens: float) -> float:
        return self.overhead_ms + self.ms_per_token * num_tokens


@dataclass(slots=True)
class _Sums:
    """Of a weighted least squares line y(x)."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float, *, weight: float = 1.0, fade: float = _SIZE_FADE) -> None:
        self.weight = self.weight * fade + weight
        self.x = self.x * fade + weight * x
        self.y = self.y * fade + weight * y
        self.xx = self.xx * fade + weight * x * x
        self.xy = self.xy * fade + weight * x * y

    def scale(self, factor: float) -> None:
        self.weight, self.x, self.y = self.weight * factor, self.x * factor, self.y * factor
        self.xx, self.xy = self.xx * factor, self.xy * factor

    def join(self, other: _Sums) -> None:
        self.weight += other.weight
        self.x += other.x
        self.y += other.y
        self.xx += other.xx
        self.xy += other.xy


@dataclass(slots=True)
class _Replica:
    """Sums of its steps by size, as the fleet's. `seen_at`: the fleet's count of steps at its last one."""

    sizes: dict[int, _Sums] = field(default_factory=dict)
    seen_at: int = 0


class StepTimes:
    """See the module; `prior` holds until steps are seen and then counts as a fraction of one."""

    def __init__(self, *, prior: StepTime) -> None:
        self._prior = prior
        self._sizes: dict[int, _Sums] = {}  # by the power of two
        self._fit = prior
        self._replicas: dict[str, _Replica] = {}
        self._num_steps = 0

    def observe(self, replica: str, *, num_tokens: int, step_ms: float) -> None:
        """A replica ran a step; steps without tokens say nothing."""
        if num_tokens <= 0 or step_ms <= 0:
            return
        size, x = num_tokens.bit_length(), float(num_tokens)
        seen = self._sizes.setdefault(size, _Sums())
        limit = _OUTLIER if seen.weight >= _FEW else _FIRST_OUTLIER
        y = min(step_ms, limit * self.of(replica).step_ms(num_tokens))
        self._num_steps += 1
        shown = self._replicas.setdefault(replica, _Replica())
        fade = self._fade(shown)
        for old, sums in list(shown.sizes.items()):
            sums.scale(fade)
            if sums.weight < _FORGOTTEN:
                del shown.sizes[old]
        shown.seen_at = self._num_steps
        shown.sizes.setdefault(size, _Sums()).add(x, y)
        seen.add(x, y)
        self._fit = self._fitted()

    def forget(self, replica: str) -> None:
        self._replicas.pop(replica, None)

    def of(self, replica: str) -> StepTime:
        shown = self._replicas.get(replica)
        if shown is None:
            return self._fit
        fit = self._fit
        weight = shown_ms = expected_ms = 0.0
        for size, sums in shown.sizes.items():
            fleet = self._sizes[size]
            # What the fleet took for steps of this size, moved along the line to this replica's own mean of tokens.
            fleet_ms = fleet.y / fleet.weight * fit.step_ms(sums.x / sums.weight) / fit.step_ms(fleet.x / fleet.weight)
            weight += sums.weight
            shown_ms += sums.y
            expected_ms += sums.weight * fleet_ms
        average_ms = _AVERAGE_STEPS * expected_ms / weight
        fade = self._fade(shown)
        factor = (average_ms + fade * shown_ms) / (average_ms + fade * expected_ms)
        return StepTime(fit.overhead_ms * factor, fit.ms_per_token * factor)

    def _fade(self, shown: _Replica) -> float:
        """Of what a replica has shown, by the steps that the others have run on average since: one without requests becomes
        average again, and is tried again."""
        return float(_FADE ** ((self._num_steps - shown.seen_at) / len(self._replicas)))

    def _fitted(self) -> StepTime:
        # The prior counts as a light step of 0 and one of _PRIOR_TOKENS tokens: without it a run of equal steps fits any line.
        total = _Sums()
        for tokens in (0.0, _PRIOR_TOKENS):
            total.add(tokens, self._prior.step_ms(int(tokens)), weight=_PRIOR_WEIGHT, fade=1.0)
        for sums in self._sizes.values():
            total.join(sums)
        weight, x, y, xx, xy = total.weight, total.x, total.y, total.xx, total.xy
        slope = (weight * xy - x * y) / (weight * xx - x * x)
        slope = max(slope, 1e-6)
        return StepTime(max((y - slope * x) / weight, 0.0), slope)
