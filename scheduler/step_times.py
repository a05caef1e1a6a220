"""How long a step takes: ms = overhead + ms_per_token * tokens, learned from the steps that replicas report.

One line is fitted to all replicas of a model (weighted least squares, old steps fading), and each replica has a factor by
which it is slower or faster, 1 until it has shown otherwise: a new replica is neither flooded nor starved. Its slope is the
prefill rate, its value at a batch's size the time of a decode step. A step far from what was expected (a pause of the
machine, a first compilation) counts only up to a limit, so that one of them moves neither.
"""

from __future__ import annotations

from dataclasses import dataclass

_FADE = 0.99  # weight of a step relative to the one after it
_FACTOR_RATE = 0.01  # how fast a replica's factor follows its last step; faster, it would follow the kind of steps instead
_FACTOR_LIMIT = 1.5  # a step moves a replica's factor as if it were at most so many times off
_FIT_LIMIT = 8.0  # and the line
_PRIOR_TOKENS = 1024.0
_PRIOR_WEIGHT = 0.1


@dataclass(frozen=True, slots=True)
class StepTime:
    """Estimated cost of a step on one replica; both positive."""

    overhead_ms: float
    ms_per_token: float

    def step_ms(self, num_tokens: int) -> float:
        return self.overhead_ms + self.ms_per_token * num_tokens


class StepTimes:
    """See the module; `prior` holds until steps are seen and then counts as a fraction of one."""

    def __init__(self, *, prior: StepTime) -> None:
        self._prior = prior
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._fit = prior
        self._factors: dict[str, float] = {}

    def observe(self, replica: str, *, num_tokens: int, step_ms: float) -> None:
        """A replica ran a step; steps without tokens say nothing."""
        if num_tokens <= 0 or step_ms <= 0:
            return
        expected = self._fit.step_ms(num_tokens)
        factor = self._factors.get(replica, 1.0)
        ratio = _clipped(step_ms / expected, around=factor, limit=_FACTOR_LIMIT)
        self._factors[replica] = factor + _FACTOR_RATE * (ratio - factor)
        x = float(num_tokens)
        y = step_ms if self._weight < 1 else expected * _clipped(step_ms / expected, around=factor, limit=_FIT_LIMIT)
        self._weight = self._weight * _FADE + 1
        self._x = self._x * _FADE + x
        self._y = self._y * _FADE + y
        self._xx = self._xx * _FADE + x * x
        self._xy = self._xy * _FADE + x * y
        self._fit = self._fitted()

    def forget(self, replica: str) -> None:
        self._factors.pop(replica, None)

    def of(self, replica: str) -> StepTime:
        factor = self._factors.get(replica, 1.0)
        return StepTime(self._fit.overhead_ms * factor, self._fit.ms_per_token * factor)

    def _fitted(self) -> StepTime:
        # The prior counts as a light step of 0 and one of _PRIOR_TOKENS tokens: without it a run of equal steps fits any line.
        far_ms = self._prior.step_ms(int(_PRIOR_TOKENS))
        weight = self._weight + 2 * _PRIOR_WEIGHT
        x, y = self._x + _PRIOR_WEIGHT * _PRIOR_TOKENS, self._y + _PRIOR_WEIGHT * (self._prior.overhead_ms + far_ms)
        xx, xy = self._xx + _PRIOR_WEIGHT * _PRIOR_TOKENS**2, self._xy + _PRIOR_WEIGHT * _PRIOR_TOKENS * far_ms
        slope = (weight * xy - x * y) / (weight * xx - x * x)
        slope = max(slope, 1e-6)
        return StepTime(max((y - slope * x) / weight, 0.0), slope)


def _clipped(value: float, *, around: float, limit: float) -> float:
    return min(max(value, around / limit), around * limit)
