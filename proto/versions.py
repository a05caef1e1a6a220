"""What the parts of a cluster must agree on, asked of every worker before it is started."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence

from .. import __version__
from . import common_pb2, worker_pb2

_WITH_CONTROLLER = ("pilotfish", "protocol")
_AMONG_RANKS = ("torch",)  # it carries the collectives between them
_ADVICE = "Install the same on every node: pip install 'pilotfish[server]'"


def own_versions(node: str) -> dict[str, str]:
    """Of this process, on that node: plain words, so that any version can read any other's."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "none"
    return {"node": node, "pilotfish": __version__, "protocol": protocol_digest(), "torch": torch}


def protocol_digest() -> str:
    """Another one for any change in the messages and calls between the parts."""
    files = (common_pb2.DESCRIPTOR, worker_pb2.DESCRIPTOR)
    return hashlib.sha256(b"".join(file.serialized_pb for file in files)).hexdigest()[:12]


def mismatch(controller: Mapping[str, str], ranks: Sequence[Mapping[str, str]]) -> str:
    """The first thing in which the ranks of a replica differ from the controller or from each other; "" if all is well."""
    for rank in ranks:
        for what in _WITH_CONTROLLER:
            if rank.get(what) != controller[what]:
                return _differ(what, rank, controller, "the controller's node")
    for rank in ranks[1:]:
        for what in _AMONG_RANKS:
            if rank.get(what) != ranks[0].get(what):
                return _differ(what, rank, ranks[0], "node")
    return ""


def _differ(what: str, one: Mapping[str, str], other: Mapping[str, str], other_is: str) -> str:
    return (
        f"node {one.get('node', 'unknown')} has {what} {one.get(what, 'unknown')}, and {other_is} {other['node']} has "
        f"{what} {other.get(what, 'unknown')}. {_ADVICE}"
    )
