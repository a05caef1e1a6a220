"""A trace of arrivals: JSON lines that name what came when, without any text.

    {"time_ms": 12.5, "token_ids": [1, 2, 3], "output_tokens": 40, "tenant": "a"}
    {"time_ms": 13.0, "block_hashes": ["00ff...", ...], "num_tokens": 70, "output_tokens": 12}

A prompt is its token ids, or the chained hashes of its full blocks (hexadecimal, as workers name them) and its length:
then blocks with one hash get the same made-up tokens, so that prefixes are shared where they were.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..common.errors import InvalidRequest

_FIELDS = {"time_ms", "token_ids", "block_hashes", "num_tokens", "output_tokens", "tenant"}
_TOKEN_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """A prompt that came at `time_ms` of any clock and was answered with `output_tokens` tokens."""

    time_ms: float
    token_ids: tuple[int, ...]
    output_tokens: int
    tenant: str = ""


def read_arrivals(lines: Iterable[str], *, block_size: int) -> list[Arrival]:
    """The arrivals in order of time; empty lines are skipped.

    Raises:
        InvalidRequest: a line is none, with its number and what is wrong.
    """
    arrivals = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            arrivals.append(_arrival(json.loads(line), number, block_size))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise InvalidRequest(f"line {number} of the trace is no arrival: {reason}") from error
    return sorted(arrivals, key=lambda arrival: arrival.time_ms)


def _arrival(row: dict[str, Any], number: int, block_size: int) -> Arrival:
    unknown = sorted(row.keys() - _FIELDS)
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a field; fields are {', '.join(sorted(_FIELDS))}")
    if ("token_ids" in row) == ("block_hashes" in row):
        raise ValueError("it needs either token_ids or block_hashes")
    output_tokens = int(row["output_tokens"])
    token_ids = (
        tuple(map(int, row["token_ids"]))
        if "token_ids" in row
        else _made_up([bytes.fromhex(h) for h in row["block_hashes"]], int(row["num_tokens"]), number, block_size)
    )
    if not token_ids or output_tokens < 1:
        raise ValueError("a prompt and its output have at least one token each")
    return Arrival(
        time_ms=float(row["time_ms"]), token_ids=token_ids, output_tokens=output_tokens, tenant=str(row.get("tenant", ""))
    )


def _made_up(hashes: list[bytes], num_tokens: int, number: int, block_size: int) -> tuple[int, ...]:
    """Tokens whose blocks are equal where `hashes` are, and a rest that no other arrival has."""
    rest = num_tokens - len(hashes) * block_size
    if not 0 <= rest < block_size:
        raise ValueError(f"{num_tokens} tokens do not have {len(hashes)} full blocks of {block_size}")
    tokens: list[int] = []
    for block_hash in hashes:
        words = [block_hash[i : i + _TOKEN_BYTES] for i in range(0, len(block_hash), _TOKEN_BYTES)]
        block = [int.from_bytes(word, "big") & 0x7FFFFFFF for word in words[:block_size]]
        tokens += block + [0] * (block_size - len(block))
    return (*tokens, *([number] * rest))
