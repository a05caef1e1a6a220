"""The errors a user can meet, and the one table that maps them to gRPC and HTTP.

Every class carries a stable `code` that travels in gRPC trailing metadata and in HTTP bodies, so that a client in another
process raises the same class (`error_from_code`). A message says what was wrong and what to do next.
"""

from __future__ import annotations

from dataclasses import dataclass


class PilotfishError(Exception):
    """Base of all errors that pilotfish raises for its users."""

    code = "internal"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class InvalidRequest(PilotfishError):
    """The request can never succeed as it is written."""

    code = "invalid_request"


class RequestTooLarge(PilotfishError):
    """The request's body or message is over the configured size."""

    code = "request_too_large"


class ConfigError(PilotfishError):
    """A configuration value, file or flag is wrong."""

    code = "config_error"


class ModelNotFound(PilotfishError):
    """No model has this name here."""

    code = "model_not_found"


class RequestNotFound(PilotfishError):
    """No request of this id can be resumed here: it ended a while ago, was not resumable, or another server had it."""

    code = "request_not_found"


class ModelLoadError(PilotfishError):
    """A checkpoint exists but cannot be loaded as it is."""

    code = "model_load_error"


class Unauthenticated(PilotfishError):
    """The server has API keys, and the call brought none, or one that is not among them."""

    code = "unauthenticated"


class PermissionDenied(PilotfishError):
    """The API key is good, but not for this: what concerns the whole cluster is for operators."""

    code = "permission_denied"


class Overloaded(PilotfishError):
    """A bounded queue is full or a limit reached; `retry_after_s` says when to try again."""

    code = "overloaded"


class Unavailable(PilotfishError):
    """No replica can take the request now (starting, draining or lost)."""

    code = "unavailable"


class DeadlineExceeded(PilotfishError):
    """The request's deadline passed before it was complete."""

    code = "deadline_exceeded"


class Cancelled(PilotfishError):
    """The caller, or an Abort, ended the request."""

    code = "cancelled"


class PoisonousRequest(PilotfishError):
    """Every replica that ran this request died of it, as far as can be told. It would go on doing so: do not send it again."""

    code = "poisonous_request"


class InternalError(PilotfishError):
    """A defect of pilotfish; the log has the traceback."""

    code = "internal"


@dataclass(frozen=True, slots=True)
class StatusRow:
    """How one error class looks on the wire.

    `grpc` is the name of a `grpc.StatusCode` member (this module does not import grpc); `openai_type` is the `type` field of an
    OpenAI-style error body.
    """

    error: type[PilotfishError]
    grpc: str
    http: int
    openai_type: str


STATUS_TABLE: tuple[StatusRow, ...] = (
    StatusRow(InvalidRequest, "INVALID_ARGUMENT", 400, "invalid_request_error"),
    StatusRow(RequestTooLarge, "RESOURCE_EXHAUSTED", 413, "invalid_request_error"),
    StatusRow(ConfigError, "FAILED_PRECONDITION", 500, "server_error"),
    StatusRow(ModelNotFound, "NOT_FOUND", 404, "invalid_request_error"),
    StatusRow(RequestNotFound, "NOT_FOUND", 404, "invalid_request_error"),
    StatusRow(ModelLoadError, "FAILED_PRECONDITION", 500, "server_error"),
    StatusRow(Unauthenticated, "UNAUTHENTICATED", 401, "authentication_error"),
    StatusRow(PermissionDenied, "PERMISSION_DENIED", 403, "permission_error"),
    StatusRow(Overloaded, "RESOURCE_EXHAUSTED", 429, "rate_limit_error"),
    StatusRow(Unavailable, "UNAVAILABLE", 503, "server_error"),
    StatusRow(DeadlineExceeded, "DEADLINE_EXCEEDED", 504, "timeout_error"),
    StatusRow(Cancelled, "CANCELLED", 499, "request_cancelled"),
    StatusRow(PoisonousRequest, "INTERNAL", 422, "server_error"),  # not 500, which clients try again
    StatusRow(InternalError, "INTERNAL", 500, "server_error"),
)

_BY_CODE = {row.error.code: row for row in STATUS_TABLE}


_MAX_MESSAGE_BYTES = 1500


def clipped(message: str) -> str:
    """A message as it goes over the wire: it may quote what a caller sent, and gRPC carries only a few KiB of it."""
    data = message.encode(errors="replace")
    return message if len(data) <= _MAX_MESSAGE_BYTES else data[:_MAX_MESSAGE_BYTES].decode(errors="ignore") + "..."


def status_row(error: PilotfishError) -> StatusRow:
    """The table's row for an error; a class outside the table is an internal error."""
    return _BY_CODE.get(error.code, _BY_CODE["internal"])


def error_from_code(code: str, message: str, *, retry_after_s: float | None = None) -> PilotfishError:
    """The error that a peer reported by `code`; an unknown code (a newer peer) becomes an InternalError that names it."""
    row = _BY_CODE.get(code)
    if row is None:
        return InternalError(f"{message} (unknown error code {code!r})", retry_after_s=retry_after_s)
    return row.error(message, retry_after_s=retry_after_s)
