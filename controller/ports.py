"""Ports that are chosen before the process that listens on them starts.

Between the choice and the listening nobody holds such a port, and a machine where Ray starts processes hands out its ephemeral
ports all the time: to whoever asks for any port, and to connections. So it is chosen among those that nobody gets unasked.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

from ..common.errors import ConfigError

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST = 20_000  # Ray's workers have those below, by its own choice
_NUM_TRIES = 100


def hold(host: str, port: int, *, flag: str) -> socket.socket:
    """A socket that listens on the port until it is closed; 0 takes a free one.

    Raises:
        ConfigError: the port is in use or the host is not of this machine; it names `flag`.
    """
    for unasked in [] if port else _unasked_ports():
        try:
            return _listen(host, unasked)
        except OSError:  # somebody asked for this one; what is wrong with the host itself shows below
            continue
    try:
        return _listen(host, port)
    except OSError as error:
        raise ConfigError(
            f"cannot serve on {host}:{port}: {error.strerror}; choose another with {flag} (0 takes a free one)"
        ) from error


def _unasked_ports() -> list[int]:
    """Some of them in no order; none where all ports are ephemeral, or a system does not tell which are."""
    try:
        first_ephemeral = int(_EPHEMERAL.read_text().split()[0])
    except OSError:
        return []
    ports = range(_FIRST, first_ephemeral)
    return random.SystemRandom().sample(ports, min(_NUM_TRIES, len(ports)))


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener
