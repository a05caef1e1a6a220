"""How a client connects and when it tries again: frozen values, given once to a Client or AsyncClient."""

from __future__ import annotations

import ipaddress
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

import grpc

from .. import __version__
from ..common.errors import ConfigError, Overloaded, PilotfishError, Unavailable

DEFAULT_PORT = 50051
API_KEY_VARIABLE = "PILOTFISH_API_KEY"


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """When a failed call is made again. A request for text that a server refused is tried again only while nothing of its
    answer has arrived; one whose connection broke is resumed where it was, with nothing lost or repeated.

    The wait before attempt k + 1 is initial_backoff_s * multiplier**(k - 1), at most max_backoff_s, but never less than
    what the server asks for (retry-after). A wait that would not end before the call's deadline is not begun.

    Attributes:
        max_attempts: calls in all; 1 never tries again.
        reconnect_timeout_s: a request that a server has taken is resumed until its connection has been broken for so long,
            however many calls that takes.
        jitter: shorten each wait by a random share of up to a half, so that many clients do not come back together.
        retry_on: the error classes worth another attempt.
    """

    max_attempts: int = 3
    initial_backoff_s: float = 0.1
    multiplier: float = 2.0
    max_backoff_s: float = 5.0
    jitter: bool = True
    retry_on: tuple[type[PilotfishError], ...] = (Unavailable, Overloaded)
    reconnect_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ConfigError(f"RetryPolicy.max_attempts must be at least 1, not {self.max_attempts}")
        if self.initial_backoff_s < 0 or self.max_backoff_s < 0 or self.multiplier < 1:
            raise ConfigError("RetryPolicy needs waits of at least 0 seconds and a multiplier of at least 1")

    def delay_s(
        self, error: PilotfishError, *, num_attempts: int, remaining_s: float | None, random_unit: float
    ) -> float | None:
        """Seconds to wait before another attempt, or None to give up.

        Args:
            num_attempts: calls made so far.
            remaining_s: until the deadline; None for no deadline.
            random_unit: a random number in [0, 1), for the jitter.
        """
        if num_attempts >= self.max_attempts or not isinstance(error, self.retry_on):
            return None
        return self._wait_s(error, num_attempts=num_attempts, remaining_s=remaining_s, random_unit=random_unit)

    def resume_delay_s(
        self, error: PilotfishError, *, num_attempts: int, broken_s: float, remaining_s: float | None, random_unit: float
    ) -> float | None:
        """As `delay_s`, for a request that a server has taken and whose connection has been broken for `broken_s`."""
        if self.max_attempts == 1 or broken_s >= self.reconnect_timeout_s:
            return None
        return self._wait_s(error, num_attempts=num_attempts, remaining_s=remaining_s, random_unit=random_unit)

    def _wait_s(
        self, error: PilotfishError, *, num_attempts: int, remaining_s: float | None, random_unit: float
    ) -> float | None:
        exponent = min(num_attempts - 1, 64)
        backoff_s = min(self.initial_backoff_s * self.multiplier**exponent, self.max_backoff_s)
        if self.jitter:
            backoff_s *= 1 - random_unit / 2
        delay_s = max(backoff_s, error.retry_after_s or 0.0)
        return delay_s if remaining_s is None or delay_s < remaining_s else None


@dataclass(frozen=True, kw_only=True, slots=True)
class TlsOptions:
    """Encryption, with PEM files.

    Attributes:
        ca: certificates of the authorities to trust; None trusts those that gRPC comes with.
        cert, key: this client's own certificate and private key, where the server asks for them (mutual TLS).
        server_name: name expected in the server's certificate, where it differs from the address.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ConfigError("TlsOptions needs both cert and key, or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises ConfigError if a file cannot be read."""
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.ca), private_key=_read(self.key), certificate_chain=_read(self.cert)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelOptions:
    """The connection itself.

    Attributes:
        keepalive_time_s: a silent connection is probed this often while a call is open.
        keepalive_timeout_s: a probe without an answer for this long ends the connection, and its calls with Unavailable.
        max_receive_bytes: larger messages of a server are refused. What may be sent is the server's to limit.
    """

    keepalive_time_s: float = 30.0
    keepalive_timeout_s: float = 10.0
    max_receive_bytes: int = 64 * 1024 * 1024

    def arguments(self, *, address: str, tls: TlsOptions | None) -> list[tuple[str, str | int]]:
        arguments: list[tuple[str, str | int]] = [
            ("grpc.keepalive_time_ms", int(self.keepalive_time_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout_s * 1000)),
            ("grpc.max_receive_message_length", self.max_receive_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.initial_reconnect_backoff_ms", 100),  # RetryPolicy waits; gRPC's own second would be on top of it
            ("grpc.min_reconnect_backoff_ms", 5000),  # how long one attempt to connect may take, whatever its name says
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.primary_user_agent", f"pilotfish/{__version__}"),
        ]
        if _is_loopback(address):
            arguments.append(("grpc.enable_http_proxy", 0))  # http_proxy in the environment is not meant for this machine
        if tls is not None and tls.server_name is not None:
            arguments.append(("grpc.ssl_target_name_override", tls.server_name))
        return arguments


DEFAULT_RETRY = RetryPolicy()
DEFAULT_CHANNEL = ChannelOptions()


def parse_address(address: str) -> str:
    """ "host:port" of a gRPC door; without a port, the usual one.

    Raises:
        ConfigError: a URL, or a port that is no number from 1 to 65535.
    """
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+)(?::(\d{1,5}))?", address)
    if match is None or not 1 <= int(match[2] or DEFAULT_PORT) <= 65535:
        raise ConfigError(f"the address must be host:port of the server's gRPC door (such as 127.0.0.1:50051), not {address!r}")
    return f"{match[1]}:{match[2] or DEFAULT_PORT}"


def key_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """What is sent with every call; None takes the key from PILOTFISH_API_KEY, if that is set.

    Raises:
        ConfigError: the key cannot be sent; the message does not show it.
    """
    if api_key is None:
        api_key = os.environ.get(API_KEY_VARIABLE) or None
    if api_key is None:
        return ()
    if not api_key.isascii() or not api_key.isprintable():
        raise ConfigError("the API key must be printable ASCII characters")
    return (("authorization", f"Bearer {api_key}"),)


def call_metadata() -> tuple[str, str]:
    """Names one call over all its attempts, so that a server that was full finds the place that it holds for it."""
    return ("pilotfish-call-id", uuid.uuid4().hex)


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read(path: str | Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the TLS file {path}: {error.strerror}") from error
