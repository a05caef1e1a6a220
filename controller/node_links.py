"""Which nodes do not reach each other though Ray and the controller reach both: found before ranks are started on them.

Ray sees nothing of such a cut and would place the ranks there again and again. What was found is remembered, and ranks are
placed without those nodes, until they have started elsewhere or there is no room elsewhere: the link may be back by then.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group_table

from .worker_process import Misplaced

_TIMEOUT_S = 2.0


class NodeLinks:
    """The cuts that were found, as pairs of Ray's node ids."""

    def __init__(self) -> None:
        self._cuts: set[tuple[str, str]] = set()

    async def check(self, ranks: Sequence[ActorHandle], group: PlacementGroup) -> None:
        """Every node of these ranks tries every other one; nodes listen at their raylets' ports.

        Raises:
            Misplaced: two of them do not reach each other, and which.
        """
        nodes = placement_group_table(group)["bundles_to_node_id"]
        workers = {nodes[rank * len(nodes) // len(ranks)]: handle for rank, handle in enumerate(ranks)}
        places = {node["NodeID"]: f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}" for node in ray.nodes()}
        tries = {node: [places[other] for other in workers if other != node] for node in workers}
        answers = await asyncio.gather(
            *(workers[node].unreachable.remote(others, timeout_s=_TIMEOUT_S) for node, others in tries.items())
        )
        by_place = {place: node for node, place in places.items()}
        cuts = [(node, by_place[place]) for node, missed in zip(tries, answers, strict=True) for place in missed]
        if cuts:
            self._cuts |= {(min(pair), max(pair)) for pair in cuts}
            hosts = " and ".join(sorted(places[node].rpartition(":")[0] for node in cuts[0]))
            raise Misplaced(f"nodes {hosts} cannot reach each other")

    def to_avoid(self) -> list[str]:
        """Nodes without which no two are left that do not reach each other: those in most cuts first."""
        return smallest_cover(sorted(self._cuts))

    def forget(self) -> None:
        self._cuts.clear()


def smallest_cover(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Members that are in every pair, greedily: the one in most pairs, then in most of the rest."""
    cover: list[str] = []
    while left := [pair for pair in pairs if not set(pair) & set(cover)]:
        counts = Counter(node for pair in left for node in pair)
        cover.append(max(sorted(counts), key=lambda node: counts[node]))
    return cover
