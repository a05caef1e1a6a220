"""The sockets that doors listen on, and ports that are chosen before the process that listens on them starts.

Between such a choice and the listening nobody holds the port, and a machine where Ray starts processes hands out its ephemeral
ports all the time: to whoever asks for any port, and to connections. So it is chosen among those that nobody gets unasked.
"""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

from ..common.errors import ConfigError

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST = 20_000  # Ray's workers have those below, by its own choice
_NUM_TRIES = 100


def listen(host: str, port: int, *, flag: str, shared: bool = False) -> socket.socket:
    """A listening TCP socket; a `shared` one takes its part of the connections to a port that other processes listen on too.

    Raises:
        ConfigError: the port is in use or the host is not of this machine; it names `flag`, which chooses the port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio lets what is small leave at once (TCP_NODELAY) only where the socket says that it is TCP: else the second write of
    # an answer waits for the reader's acknowledgement of the first, 40 ms on a connection that was kept.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot serve on {host}:{port}: {error.strerror}; choose another with {flag} (0 takes a free one) or --host"
        ) from error
    listener.setblocking(False)
    return listener


def hold(host: str, port: int, *, flag: str) -> socket.socket:
    """`listen`, to keep others off a port until it is closed; 0 takes one that stays free then, as far as can be.

    Raises:
        ConfigError: as `listen`.
    """
    for unasked in [] if port else _unasked_ports():
        with contextlib.suppress(ConfigError):  # somebody asked for this one; what is wrong with the host shows below
            return listen(host, unasked, flag=flag)
    return listen(host, port, flag=flag)


def _unasked_ports() -> list[int]:
    """Some of them in no order; none where all ports are ephemeral, or a system does not tell which are."""
    try:
        first_ephemeral = int(_EPHEMERAL.read_text().split()[0])
    except OSError:
        return []
    ports = range(_FIRST, first_ephemeral)
    return random.SystemRandom().sample(ports, min(_NUM_TRIES, len(ports)))
