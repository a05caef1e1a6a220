"""API keys: "pf-ID-SECRET", of which the configuration keeps "ID:HASH" only.

ID (8 bytes, public) finds the line; SECRET is 32 random bytes. HASH is HMAC-SHA256 of the secret under the id, so equal secrets
would not show. A fast hash is the right one: slow hashes (scrypt, argon2) protect what people can remember and an attacker can
guess. Nobody guesses 2^256 secrets, and a key is checked on every call.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence

from .errors import ConfigError

ID_BYTES, SECRET_BYTES = 8, 32
_KEY = re.compile(r"pf-([0-9a-f]{16})-([A-Za-z0-9_-]{43})")
_HASH_LINE = re.compile(r"[0-9a-f]{16}:[0-9a-f]{64}")
_NO_DIGEST = "0" * 64


def make_key(key_id: bytes, secret: bytes) -> str:
    """The key of ID_BYTES and SECRET_BYTES of a cryptographic random source."""
    assert (len(key_id), len(secret)) == (ID_BYTES, SECRET_BYTES)
    return f"pf-{key_id.hex()}-{base64.urlsafe_b64encode(secret).decode().rstrip('=')}"


def hash_line(key: str) -> str:
    """What a configuration keeps of a key.

    Raises:
        ConfigError: it is not one of ours; the message does not show it.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        raise ConfigError("this is not a pilotfish API key: `pilotfish keys new NAME` makes one")
    return f"{match[1]}:{_digest(match[1], match[2])}"


def check_hash_line(line: str) -> None:
    """Raises ConfigError if it is not the hash of a key (a key itself is not shown)."""
    if not _HASH_LINE.fullmatch(line):
        raise ConfigError(
            "a tenant's keys must be given as hashes (16 hex digits, ':', 64 hex digits), never the keys themselves: "
            "`pilotfish keys new NAME` prints both"
        )


class KeyRing:
    """Finds whose key it is: `hash_lines` are those of each owner.

    Raises:
        ConfigError: a line is not a hash, or two have the same id.
    """

    def __init__(self, hash_lines: Mapping[str, Sequence[str]]) -> None:
        self._entries: dict[str, tuple[str, str]] = {}
        for owner, lines in hash_lines.items():
            for line in lines:
                check_hash_line(line)
                key_id, _, digest = line.partition(":")
                if key_id in self._entries:
                    raise ConfigError(f"the key {key_id} is given twice, to {self._entries[key_id][0]} and {owner}")
                self._entries[key_id] = owner, digest

    def __len__(self) -> int:
        return len(self._entries)

    def owner(self, key: str) -> str | None:
        """The owner; None for a key that is not here. Takes as long for a wrong secret as for a wrong id."""
        match = _KEY.fullmatch(key)
        if match is None:
            return None
        owner, digest = self._entries.get(match[1], (None, _NO_DIGEST))
        return owner if hmac.compare_digest(_digest(match[1], match[2]), digest) else None


def _digest(key_id: str, secret: str) -> str:
    return hmac.new(key_id.encode(), secret.encode(), hashlib.sha256).hexdigest()
