"""Chained block hashes: the names of KV blocks across processes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

HASH_BYTES = 16


def root_hash(salt: bytes = b"") -> bytes:
    """The parent of a sequence's first block; `salt` separates model versions, adapters and tenants."""
    return blake2b(salt, digest_size=HASH_BYTES, person=b"pilotfish-root").digest()


def version_salt(version: str, salt: bytes) -> bytes:
    """A salt for one version of the model; equal only for equal versions and salts."""
    return b"\xffversion:" + version.encode() + b"\xff" + salt if version else salt  # no text has these bytes in UTF-8


def block_hashes(token_ids: Sequence[int], block_size: int, *, parent: bytes) -> list[bytes]:
    """Hashes of the full blocks of `token_ids`: h[i] = BLAKE2b-128(h[i-1] || tokens as little-endian int32).

    A hash names the whole prefix that ends with its block. `parent` is `root_hash(...)` for the start of a sequence, or the
    hash of the block before `token_ids[0]`, so that a growing sequence hashes only its new blocks.
    """
    data = array("i", token_ids).tobytes()
    stride = block_size * 4
    hashes = []
    for start in range(0, len(data) - stride + 1, stride):
        parent = blake2b(parent + data[start : start + stride], digest_size=HASH_BYTES).digest()
        hashes.append(parent)
    return hashes
