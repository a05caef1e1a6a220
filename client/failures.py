"""From a failed gRPC call to the error class that says what happened: the one place that knows both.

A pilotfish server names the class in trailing metadata. A plain status comes from gRPC itself or from something between.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import grpc

from ..common.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PilotfishError,
    RequestTooLarge,
    Unauthenticated,
    Unavailable,
    error_from_code,
)

ERROR_CODE_KEY = "pilotfish-error-code"
RETRY_AFTER_KEY = "pilotfish-retry-after-ms"

# What a plain status means, and the message; {details} is gRPC's own text.
_PLAIN_STATUSES: Mapping[str, tuple[type[PilotfishError], str]] = {
    "UNAVAILABLE": (
        Unavailable,
        "cannot reach a pilotfish server at {address} ({details}). Is it running? `pilotfish serve MODEL` starts one; its "
        "start message has the gRPC address",
    ),
    "DEADLINE_EXCEEDED": (DeadlineExceeded, "{limit} passed before the answer of {address} was complete"),
    "CANCELLED": (Unavailable, "the server at {address} ended the call; it may be shutting down ({details})"),
    "RESOURCE_EXHAUSTED": (Overloaded, "{address} has no room for the request ({details})"),
    "UNAUTHENTICATED": (
        Unauthenticated,
        "{address} refused the credentials ({details}): give the client a valid api_key= or tls=",
    ),
    "PERMISSION_DENIED": (
        Unauthenticated,
        "{address} refused the credentials ({details}): give the client a valid api_key= or tls=",
    ),
    "UNIMPLEMENTED": (
        ConfigError,
        "{address} does not speak this client's pilotfish.v1.Inference ({details}): is it a pilotfish server of this version?",
    ),
    "INVALID_ARGUMENT": (InvalidRequest, "{details}"),
    "NOT_FOUND": (ModelNotFound, "{details}"),
    "FAILED_PRECONDITION": (ConfigError, "{details}"),
}
_OTHER_STATUS = (InternalError, "{address} ended the call with {status} ({details})")


def is_break(failure: grpc.RpcError) -> bool:
    """Whether the connection broke, or the server's process ended: nothing was decided about the request."""
    named = any(key == ERROR_CODE_KEY for key, _ in failure.trailing_metadata() or ())
    return not named and failure.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def error_from_call(
    code: grpc.StatusCode,
    details: str | None,
    metadata: Iterable[tuple[str, str | bytes]] | None,
    *,
    address: str,
    timeout_s: float | None,
    answering: bool,
    cancelled_here: bool,
) -> PilotfishError:
    """The error of a call that ended with a status other than OK.

    Args:
        address: of the server, for the message.
        timeout_s: what the caller allowed.
        answering: whether part of the answer had arrived.
        cancelled_here: whether this client ended the call itself.
    """
    details = details or "no details"
    trailing = {key: value for key, value in metadata or () if isinstance(value, str)}
    if ERROR_CODE_KEY in trailing:
        retry_after_s = float(trailing[RETRY_AFTER_KEY]) / 1000 if RETRY_AFTER_KEY in trailing else None
        return error_from_code(trailing[ERROR_CODE_KEY], details, retry_after_s=retry_after_s)
    if cancelled_here and code == grpc.StatusCode.CANCELLED:
        return Cancelled("the call was ended by this client")
    if answering and code == grpc.StatusCode.UNAVAILABLE:
        return Unavailable(f"the connection to {address} was lost before the answer was complete ({details})")
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:  # gRPC's own limit on messages
        return RequestTooLarge(details)
    error, message = _PLAIN_STATUSES.get(code.name, _OTHER_STATUS)
    limit = "the deadline" if timeout_s is None else f"timeout_s={timeout_s:g}"
    return error(message.format(address=address, details=details, limit=limit, status=code.name))
