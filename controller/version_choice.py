"""Which version of the model a sequence goes on with, where replicas have several: while other weights are rolled out.

A stream that has begun keeps its version while there is a replica of it; another takes the version whose replicas have room
and less to do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..common import logs
from ..scheduler.router import Router
from .front_end import prompt_hashes
from .sequence_state import SequenceState

logger = logging.getLogger(__name__)


class VersionChoice:
    """See the module. It is told of every replica that the router knows."""

    def __init__(self, router: Router, *, block_size: int) -> None:
        self._router = router
        self._block_size = block_size
        self._version_of: dict[str, str] = {}
        self.is_single = True

    def add_replica(self, name: str, version: str) -> None:
        self._version_of[name] = version
        self._count()

    def remove_replica(self, name: str) -> None:
        del self._version_of[name]
        self._count()

    def narrow(self, sequence: SequenceState, candidates: Sequence[str]) -> Sequence[str]:
        """Those of the candidates that are of one version, which is the sequence's from then on."""
        version = self._version_of[candidates[0]]
        if not self.is_single:
            of: dict[str, list[str]] = {}
            for name in candidates:
                of.setdefault(self._version_of[name], []).append(name)
            if sequence.replica and sequence.version in of:
                version = sequence.version
            else:
                with_room = [v for v, names in of.items() if any(map(self._router.has_room, names))] or list(of)
                version = min(with_room, key=lambda v: sum(map(self._router.num_active, of[v])) / len(of[v]))
            candidates = of[version]
        if sequence.version != version:
            if sequence.output_token_ids:
                name = sequence.request.request_id
                about = logs.about(sequence.stream.request_id, version=version)
                logger.warning("%s goes on with version %r of the model", name, version, extra=about)
            sequence.version = version
            sequence.prompt_hashes = prompt_hashes(sequence.request, self._block_size, version=version)
        return candidates

    def _count(self) -> None:
        self.is_single = len(set(self._version_of.values())) <= 1
