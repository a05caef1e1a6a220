"""How long a step takes: ms = overhead + ms_per_token * tokens, learned from the steps that replicas report.

One line is fitted to all replicas of a model (weighted least squares; old steps fade as others of their size come, so that
many decode steps do not outweigh the prefills between them), and each replica has a factor by which it is slower or faster
than the line says now, 1 until it has shown otherwise: a new replica is neither flooded nor starved. Its slope is the prefill
rate, its value at a batch's size the time of a decode step. A step far from what was expected (a pause of the machine, a
first compilation) counts only up to a limit, so that one of them moves neither.
"""

from __future__ import annotations

from dataclasses import dataclass

_FADE = 0.99  # weight of a step of a replica relative to its next one
_SIZE_FADE = 0.98  # and, for the line, of a step of the fleet relative to the next one of about its size
_AVERAGE_STEPS = 10.0  # a replica counts as average until it has shown more steps than this
_OUTLIER = 3.0  # a step counts as at most so many times what its replica was expected to take
_PRIOR_TOKENS = 1024.0
_PRIOR_WEIGHT = 0.1


@dataclass(frozen=True, slots=True)
class StepTime:
    """Estimated cost of a step on one replica; both positive."""

    overhead_ms: float
    ms_per_token: float

    def step_ms(self, num_tokens: int) -> float:
        return self.overhead_ms + self.ms_per_token * num_tokens


@dataclass(slots=True)
class _Replica:
    """Fading sums of its steps: number, tokens, milliseconds. `seen_at`: the fleet's count of steps at its last one."""

    weight: float = 0.0
    tokens: float = 0.0
    ms: float = 0.0
    seen_at: int = 0


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

    def join(self, other: _Sums) -> None:
        self.weight += other.weight
        self.x += other.x
        self.y += other.y
        self.xx += other.xx
        self.xy += other.xy


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
        step_ms = min(step_ms, _OUTLIER * self.of(replica).step_ms(num_tokens))
        self._num_steps += 1
        x, y = float(num_tokens), step_ms
        shown = self._replicas.setdefault(replica, _Replica())
        fade = self._fade(shown)
        shown.weight, shown.tokens, shown.ms = shown.weight * fade + 1, shown.tokens * fade + x, shown.ms * fade + y
        shown.seen_at = self._num_steps
        self._sizes.setdefault(num_tokens.bit_length(), _Sums()).add(x, y)
        self._fit = self._fitted()

    def forget(self, replica: str) -> None:
        self._replicas.pop(replica, None)

    def of(self, replica: str) -> StepTime:
        shown = self._replicas.get(replica)
        if shown is None:
            return self._fit
        fade, fit = self._fade(shown), self._fit
        average_ms = _AVERAGE_STEPS * (fit.overhead_ms + fit.ms_per_token * shown.tokens / shown.weight)
        expected_ms = fit.overhead_ms * shown.weight + fit.ms_per_token * shown.tokens
        factor = (average_ms + fade * shown.ms) / (average_ms + fade * expected_ms)
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
