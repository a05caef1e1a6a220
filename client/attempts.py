"""The calls that one request may take: its deadline over all of them, and whether another is worth making."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import grpc

from ..common.errors import InvalidRequest
from .failures import error_from_call
from .options import RetryPolicy


class Attempts:
    """Begins with the request; `timeout_s` counts from then, waits included.

    `address` is for messages; `is_closed` says whether the client was closed, which ends its calls.
    """

    def __init__(self, *, address: str, policy: RetryPolicy, timeout_s: float | None, is_closed: Callable[[], bool]) -> None:
        if timeout_s is not None and not 0 < timeout_s < 1e9:
            raise InvalidRequest(f"timeout_s must be a positive number of seconds, not {timeout_s!r}")
        self._address = address
        self._policy = policy
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._is_closed = is_closed
        self._num_attempts = 1

    def remaining_s(self) -> float | None:
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def delay_after(self, failure: grpc.RpcError, *, answering: bool = False, cancelled_here: bool = False) -> float:
        """Seconds to wait before the next call, which is then due.

        Args:
            answering: part of the answer has been handed out; there is no other attempt then.
            cancelled_here: the call was ended on this side.

        Raises:
            PilotfishError: there is no other attempt; the class says what happened.
        """
        error = error_from_call(
            failure.code(),
            failure.details(),
            failure.trailing_metadata(),
            address=self._address,
            timeout_s=self._timeout_s,
            answering=answering,
            cancelled_here=cancelled_here or self._is_closed(),
        )
        delay_s = self._policy.delay_s(
            error, num_attempts=self._num_attempts, remaining_s=self.remaining_s(), random_unit=random.random()
        )
        if answering or delay_s is None:
            raise error from failure
        self._num_attempts += 1
        return delay_s
