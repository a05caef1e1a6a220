"""The addresses by which a client reaches one cluster, and which of them was good last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..common.errors import ConfigError
from .options import parse_address


@dataclass(slots=True)
class Doors:
    """A request begins at `preferred`, and goes on at the next one where a connection breaks; see Attempts."""

    addresses: tuple[str, ...]
    preferred: int = 0

    @classmethod
    def parse(cls, address: str | Sequence[str]) -> Doors:
        """Raises ConfigError: there is none, or one is no host:port."""
        addresses = (address,) if isinstance(address, str) else tuple(address)
        if not addresses:
            raise ConfigError("give the server's address, host:port, or several of one cluster")
        return cls(tuple(map(parse_address, addresses)))
