"""Which running sequence gives its blocks up when others need them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .sequence import SequenceState


def choose_victim(candidates: Iterable[SequenceState], running: Sequence[SequenceState]) -> SequenceState | None:
    """Of the candidates: the lowest priority; of these, the tenant whose `running` sequences hold most blocks for its weight;
    of its sequences the last in line. None without candidates."""
    held: dict[str, float] = {}
    for sequence in running:
        tenant = sequence.request.tenant
        held[tenant.name] = held.get(tenant.name, 0.0) + len(sequence.block_ids) / tenant.weight

    def rank(sequence: SequenceState) -> tuple[int, float, tuple[int, int]]:
        request = sequence.request
        return -request.priority, held[request.tenant.name], sequence.key

    return max(candidates, key=rank, default=None)
