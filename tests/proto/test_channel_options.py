"""gRPC says nothing of an option that it does not know."""

from __future__ import annotations

import re
from pathlib import Path

import grpc._cython.cygrpc
import pilotfish

PARTS = ("client", "controller", "proto", "workers")


def test_every_channel_option_is_one_of_grpcs() -> None:
    root = Path(pilotfish.__file__).parent
    library = Path(grpc._cython.cygrpc.__file__).read_bytes()
    sources = {path.name: path.read_text() for part in PARTS for path in (root / part).glob("*.py")}
    names = {(name, option) for name, text in sources.items() for option in re.findall(r'\("(grpc\.[a-z0-9_.]+)",', text)}
    assert len({option for _, option in names}) > 10
    unknown = [(name, option) for name, option in sorted(names) if f"{option}\0".encode() not in library]
    assert unknown == []
