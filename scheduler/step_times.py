"""How long a step takes, learned from the steps that replicas report: what its sequences take that decode, by their number, and
what prompts add, by their tokens.

Both are curves, the same for all replicas of a model: the mean of the steps of each size (by the power of two; old steps fade
as others of their size come, so that many decode steps do not outweigh the prefills between them) and straight lines from size
to size. Neither is one line: a prompt of a hundred tokens adds next to nothing, since every step reads all weights, and from
there on each token takes its time. Sizes that nobody has run are in proportion to the prior as the nearest size seen.

Each replica has a factor by which it is slower or faster than the fleet is in steps of the same sizes, 1 until it has shown
otherwise: a new replica is neither flooded nor starved, and one that alone ran long prompts is not taken for a slow one. A step
far from what was expected (a pause of the machine, a first compilation) counts only up to a limit; a wide one while steps of
its size are new.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

_FADE = 0.99  # weight of what a replica has shown, for each step that every other one has run since
_SIZE_FADE = 0.98  # weight of a step relative to the next one of about its size
_AVERAGE_STEPS = 10.0  # a replica counts as average until it has shown more steps than this
_OUTLIER = 3.0  # a step counts as at most so many times what its replica was expected to take
_FIRST_OUTLIER = 30.0  # while fewer than _FEW steps of its size were seen: the prior may be far off
_FEW = 3.0
_FORGOTTEN = 1e-3  # weight below which a replica has shown nothing of a size
_DRAW_STEPS = 64
_END = 1024.0  # tokens to which a curve reaches at least


class _Curve:
    """Straight lines through points by growing x, the first of which is at 0; the last line goes on."""

    __slots__ = ("slope", "x", "y")

    def __init__(self, x: list[float], y: list[float]) -> None:
        self.x, self.y = x, y
        self.slope = [(y[i] - y[i - 1]) / (x[i] - x[i - 1]) for i in range(1, len(x))]
        self.slope.append(self.slope[-1])

    def at(self, x: float) -> float:
        points = self.x
        index = bisect_right(points, x) - 1
        return self.y[index] + (x - points[index]) * self.slope[index]


class StepTime:
    """Milliseconds of a step on one replica. `decode`: by sequences that decode; `prompts`: by prompt tokens beside one."""

    __slots__ = ("decode", "factor", "prompts")

    def __init__(self, decode: _Curve, prompts: _Curve, factor: float = 1.0) -> None:
        self.decode, self.prompts, self.factor = decode, prompts, factor

    @classmethod
    def line(cls, overhead_ms: float, ms_per_token: float) -> StepTime:
        """The same for every token, of a prompt or not."""
        one_ms = overhead_ms + ms_per_token
        decode = _Curve([0.0, _END], [overhead_ms, overhead_ms + _END * ms_per_token])
        return cls(decode, _Curve([0.0, _END], [one_ms, one_ms + _END * ms_per_token]))

    @property
    def overhead_ms(self) -> float:
        """Of a step before its tokens."""
        return self.factor * self.decode.y[0]

    @property
    def ms_per_token(self) -> float:
        """Of a prompt token in a step with a thousand of them."""
        return self.prompt_ms(_END) / _END

    def prompt_ms(self, num_tokens: float) -> float:
        """What prompt tokens add to a step."""
        if not num_tokens:
            return 0.0
        prompts = self.prompts
        return self.factor * (prompts.at(num_tokens) - prompts.y[0])

    def decode_ms(self, num_decoding: float) -> float:
        """Of a step without prompts."""
        return self.factor * self.decode.at(num_decoding)

    def step_ms(self, num_decoding: float, num_prompt_tokens: float) -> float:
        return self.decode_ms(num_decoding) + self.prompt_ms(num_prompt_tokens)


@dataclass(slots=True)
class _Sums:
    """Over steps of one size, by their weights: sequences that decoded, prompt tokens, milliseconds."""

    weight: float = 0.0
    decoding: float = 0.0
    prompt: float = 0.0
    ms: float = 0.0

    def add(self, num_decoding: int, num_prompt_tokens: int, step_ms: float) -> None:
        self.fade(_SIZE_FADE)
        self.weight += 1.0
        self.decoding += num_decoding
        self.prompt += num_prompt_tokens
        self.ms += step_ms

    def fade(self, factor: float) -> None:
        self.weight *= factor
        self.decoding *= factor
        self.prompt *= factor
        self.ms *= factor


@dataclass(slots=True)
class _Replica:
    """Sums of its steps by size, as the fleet's, and the time that the draw number `draw` gave it. `seen_at`: the fleet's count
    of steps at its last one."""

    time: StepTime
    sizes: dict[int, _Sums] = field(default_factory=dict)
    seen_at: int = 0
    draw: int = 0


class StepTimes:
    """See the module; `prior` holds until steps are seen."""

    def __init__(self, *, prior: StepTime) -> None:
        self._prior = prior
        self._sizes: dict[int, _Sums] = {}  # by the power of two: of prompt tokens, or, negative, of sequences without any
        self._replicas: dict[str, _Replica] = {}
        self._num_steps = 0
        self._fleet = prior
        self._draw = 0
        self._next_draw_at = 1

    def observe(self, replica: str, *, num_decoding: int, num_prompt_tokens: int, step_ms: float) -> None:
        """A replica ran a step; steps without tokens say nothing."""
        if num_decoding + num_prompt_tokens <= 0 or step_ms <= 0:
            return
        size = num_prompt_tokens.bit_length() if num_prompt_tokens else -num_decoding.bit_length()
        seen = self._sizes.get(size)
        limit = _OUTLIER if seen is not None and seen.weight >= _FEW else _FIRST_OUTLIER
        step_ms = min(step_ms, limit * self.of(replica).step_ms(num_decoding, num_prompt_tokens))
        self._num_steps += 1
        shown = self._replicas.setdefault(replica, _Replica(self._fleet))
        fade = self._fade(shown)
        for old, sums in list(shown.sizes.items()):
            sums.fade(fade)
            if sums.weight < _FORGOTTEN:
                del shown.sizes[old]
        shown.seen_at = self._num_steps
        shown.sizes.setdefault(size, _Sums()).add(num_decoding, num_prompt_tokens, step_ms)
        self._sizes.setdefault(size, _Sums()).add(num_decoding, num_prompt_tokens, step_ms)

    def forget(self, replica: str) -> None:
        self._replicas.pop(replica, None)

    def of(self, replica: str) -> StepTime:
        """Drawn anew when there are a sixteenth more steps than at the last time, or some dozens."""
        if self._num_steps >= self._next_draw_at:
            self._fleet = self._drawn()
            self._draw += 1
            self._next_draw_at = self._num_steps + max(1, min(self._num_steps // 16, _DRAW_STEPS))
        shown = self._replicas.get(replica)
        if shown is None:
            return self._fleet
        if shown.draw != self._draw:
            shown.draw = self._draw
            shown.time = StepTime(self._fleet.decode, self._fleet.prompts, self._factor(shown))
        return shown.time

    def _factor(self, shown: _Replica) -> float:
        weight = shown_ms = expected_ms = 0.0
        for sums in shown.sizes.values():
            weight += sums.weight
            shown_ms += sums.ms
            expected_ms += sums.weight * self._fleet.step_ms(sums.decoding / sums.weight, sums.prompt / sums.weight)
        average_ms = _AVERAGE_STEPS * expected_ms / weight
        fade = self._fade(shown)
        return (average_ms + fade * shown_ms) / (average_ms + fade * expected_ms)

    def _fade(self, shown: _Replica) -> float:
        """Of what a replica has shown, by the steps that the others have run on average since: one without requests becomes
        average again, and is tried again."""
        return float(_FADE ** ((self._num_steps - shown.seen_at) / len(self._replicas)))

    def _drawn(self) -> StepTime:
        """The fleet's curves through the means of all sizes."""
        means = [
            (size, sums.decoding / sums.weight, sums.prompt / sums.weight, sums.ms / sums.weight)
            for size, sums in sorted(self._sizes.items())
        ]
        only_decode = [(decoding, ms) for size, decoding, _, ms in reversed(means) if size < 0]
        decode = _through(only_decode, self._prior.decode)
        one_ms = decode.at(1.0)
        with_prompts = [(prompt, ms - decode.at(decoding) + one_ms) for size, decoding, prompt, ms in means if size > 0]
        return StepTime(decode, _through([(0.0, one_ms), *with_prompts], self._prior.prompts))


def _through(points: list[tuple[float, float]], prior: _Curve) -> _Curve:
    """A curve that does not fall through points by growing x; before the first and behind the last as the prior."""
    if not points:
        return prior
    (first, first_y), (last, last_y) = points[0], points[-1]
    x, y = [0.0], [first_y * min(1.0, prior.y[0] / prior.at(first))]
    for point_x, point_y in points:
        if point_x > x[-1]:
            x.append(point_x)
            y.append(max(point_y, y[-1]))
    end = max(2.0 * last, _END)
    x.append(end)
    y.append(max(y[-1], last_y * prior.at(end) / prior.at(last)))
    return _Curve(x, y)
