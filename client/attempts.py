"""The calls that one request may take: its deadline over all of them, and whether another is worth making."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import grpc

from ..common.errors import InvalidRequest, PilotfishError, RequestNotFound, Unavailable
from .continuation import Continuation
from .doors import Doors
from .failures import error_from_call, is_break
from .options import RetryPolicy


class Attempts:
    """Begins with the request; `timeout_s` counts from then, waits included.

    Where a connection breaks the next call goes to the next of `doors`. `is_closed` says whether the client was closed, which
    ends its calls.

    Attributes:
        door: number of the door for the call that runs or is due.
    """

    def __init__(self, *, doors: Doors, policy: RetryPolicy, timeout_s: float | None, is_closed: Callable[[], bool]) -> None:
        if timeout_s is not None and not 0 < timeout_s < 1e9:
            raise InvalidRequest(f"timeout_s must be a positive number of seconds, not {timeout_s!r}")
        self._doors = doors
        self.door = doors.preferred
        self._policy = policy
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._is_closed = is_closed
        self._num_attempts = 1
        self._broken_since: float | None = None
        self._num_resumes = 0

    def progressed(self) -> None:
        """Something arrived: the next break is a new one."""
        self._broken_since, self._num_resumes = None, 0
        self._doors.preferred = self.door

    def remaining_s(self) -> float | None:
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def delay_after(self, failure: grpc.RpcError) -> float:
        """Seconds to wait before the next call of a short request, which is then due.

        Raises:
            PilotfishError: there is no other attempt; the class says what happened.
        """
        error = self._error(failure)
        self._turn_from(failure)
        return self._delay_s(error, failure)

    def delay_before_next(
        self, failure: grpc.RpcError, continuation: Continuation, *, answering: bool, cancelled_here: bool = False
    ) -> float:
        """As `delay_after`, for a request for text; `continuation` then says which call is due.

        Args:
            answering: part of the answer has been handed out; from then on the only other call is a Resume.
            cancelled_here: the call was ended on this side.

        Raises:
            PilotfishError: there is no other attempt; the class says what happened.
        """
        cancelled_here = cancelled_here or self._is_closed()
        error = self._error(failure, answering=answering, cancelled_here=cancelled_here)
        self._turn_from(failure)
        has_broken = is_break(failure) and not cancelled_here
        if has_broken or (continuation.is_resuming and isinstance(error, Unavailable)):
            continuation.is_resuming = True
            return self._resume_delay_s(error, failure) if continuation.has_begun else self._delay_s(error, failure)
        if continuation.can_begin_anew(error):
            continuation.is_resuming = False
            return self._delay_s(Unavailable(error.message), failure)
        if answering and isinstance(error, RequestNotFound):
            raise Unavailable(
                f"the connection to {self._address} was lost before the answer was complete, and the server does not have the "
                f"request any more ({error.message})"
            ) from failure
        if answering or continuation.is_resuming:
            raise error from failure
        return self._delay_s(error, failure)

    @property
    def _address(self) -> str:
        return self._doors.addresses[self.door]

    def _turn_from(self, failure: grpc.RpcError) -> None:
        """After a break the next door is due."""
        if is_break(failure):
            self.door = (self.door + 1) % len(self._doors.addresses)

    def _error(self, failure: grpc.RpcError, *, answering: bool = False, cancelled_here: bool = False) -> PilotfishError:
        return error_from_call(
            failure.code(),
            failure.details(),
            failure.trailing_metadata(),
            address=self._address,
            timeout_s=self._timeout_s,
            answering=answering,
            cancelled_here=cancelled_here or self._is_closed(),
        )

    def _delay_s(self, error: PilotfishError, failure: grpc.RpcError) -> float:
        delay_s = self._policy.delay_s(
            error, num_attempts=self._num_attempts, remaining_s=self.remaining_s(), random_unit=random.random()
        )
        if delay_s is None:
            raise error from failure
        self._num_attempts += 1
        return delay_s

    def _resume_delay_s(self, error: PilotfishError, failure: grpc.RpcError) -> float:
        now = time.monotonic()
        self._broken_since = self._broken_since or now
        self._num_resumes += 1
        delay_s = self._policy.resume_delay_s(
            error,
            num_attempts=self._num_resumes,
            broken_s=now - self._broken_since,
            remaining_s=self.remaining_s(),
            random_unit=random.random(),
        )
        if delay_s is None:
            raise error from failure
        return delay_s
