"""What one tenant may use at a time: requests in flight, and tokens a minute. Pure: the caller says what time it is.

A tenant's tokens are a bucket that holds a minute's worth and fills steadily. A request takes its prompt and an estimate of its
output when it is accepted; what it really produced is settled at its end, and the bucket may then go below zero: later requests
wait the longer.
"""

from __future__ import annotations

from ..common.errors import Overloaded
from .drain_rate import DrainRate, Pace
from .retry_promises import RetryPromises

_MAX_PROMISES = 16_384


class TokenBucket:
    """`tokens_per_minute` is both what it holds and what flows in. Times are milliseconds and never decrease."""

    def __init__(self, tokens_per_minute: int) -> None:
        self._capacity = float(tokens_per_minute)
        self._level = self._capacity
        self._filled_ms = 0.0

    def wait_ms(self, num_tokens: float, now_ms: float) -> float:
        """Until so many tokens are there, or the bucket is full, if they are more than it holds; 0: now."""
        self._fill(now_ms)
        missing = min(num_tokens, self._capacity) - self._level
        return max(0.0, missing * 60_000 / self._capacity)

    def take(self, num_tokens: float, now_ms: float) -> None:
        """Take tokens, or give some back (negative)."""
        self._fill(now_ms)
        self._level = min(self._level - num_tokens, self._capacity)

    def _fill(self, now_ms: float) -> None:
        self._level = min(self._capacity, self._level + (now_ms - self._filled_ms) * self._capacity / 60_000)
        self._filled_ms = now_ms


class TenantLimits:
    """The limits of one tenant; None is no limit. `enter`, then `take_tokens`, and `leave` for every request that entered."""

    def __init__(self, tenant: str, *, max_requests: int | None, max_tokens_per_minute: int | None) -> None:
        self._tenant = tenant
        self._max_requests = max_requests
        self._max_tokens_per_minute = max_tokens_per_minute
        self._bucket = None if max_tokens_per_minute is None else TokenBucket(max_tokens_per_minute)
        self._drain = DrainRate()
        self._promises = RetryPromises(max_promises=_MAX_PROMISES)
        self.num_in_flight = 0

    def enter(self, now_ms: float, *, retry_key: str = "") -> None:
        """A request arrives. `retry_key` tells its caller's attempts from those of others.

        Raises:
            Overloaded: as many are in flight as are allowed, or places are held for callers that were told to come now;
                `retry_after_s` is when one is held for this caller.
        """
        if self._max_requests is not None:
            num_free, max_held = self._max_requests - self.num_in_flight, self._max_requests // 2
            if not self._promises.lets_in(retry_key, now_ms, num_free=num_free, max_held=max_held):
                raise self._refusal(self._max_requests, retry_key, now_ms)
        self.enter_again(now_ms)

    def _refusal(self, max_requests: int, retry_key: str, now_ms: float) -> Overloaded:
        wait_ms, gap_ms = self._drain.wait_ms(now_ms, Pace()), self._drain.gap_ms(now_ms, Pace())
        wait_s = self._promises.make(retry_key, wait_ms=wait_ms, gap_ms=gap_ms, now_ms=now_ms) / 1000
        message = f"{self._tenant} has {self.num_in_flight} requests in flight, of the {max_requests} that are its limit"
        return Overloaded(f"{message}; try again in {wait_s:.1f} s", retry_after_s=wait_s)

    def enter_again(self, now_ms: float) -> None:
        """A request had entered before its controller was replaced: the limit has been met then."""
        if not self.num_in_flight:
            self._drain.begin(now_ms)
        self.num_in_flight += 1

    def take_tokens(self, num_tokens: float, now_ms: float) -> None:
        """Tokens a request is expected to use.

        Raises:
            Overloaded: they are more than there are this minute; `retry_after_s` is when they are there.
        """
        if self._bucket is None:
            return
        if wait_ms := self._bucket.wait_ms(num_tokens, now_ms):
            wait_s = wait_ms / 1000
            message = f"{self._tenant} has used its {self._max_tokens_per_minute} tokens a minute; try again in {wait_s:.1f} s"
            raise Overloaded(message, retry_after_s=wait_s)
        self._bucket.take(num_tokens, now_ms)

    def leave(self, now_ms: float, *, tokens_taken: float = 0.0, tokens_used: float = 0.0) -> None:
        """A request has ended, or was refused after it had entered."""
        self.num_in_flight -= 1
        self._drain.departed(now_ms, has_waited=True, is_empty=not self.num_in_flight)
        if self._bucket is not None:
            self._bucket.take(tokens_used - tokens_taken, now_ms)
