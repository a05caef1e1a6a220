"""EPLB: which experts get a second copy, and which rank holds what, from the loads that were measured.

A *logical* expert is one of the model's; a *physical* expert is a slot of a rank that holds a copy of one. Slot p is on rank
p // (num_physical // num_ranks). Ranks are numbered node by node. All functions are pure and deterministic.

After DeepSeek's EPLB (2025, 'balanced packing' and 'hierarchical load balancing'), with two differences: copies of one expert
are always on different ranks, so that a lost rank takes no expert with it that has two; and `rebalance_experts` starts from
what is there and moves little.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .expert_packing import FREE, Packs

Loads = Sequence[Sequence[float]]  # [layers][logical experts], for instance tokens routed in a window


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLayout:
    """How many slots there are, and where. `num_groups` are groups of experts that follow one another and like one node.

    With `min_replicas` of two, the loss of any one rank loses no expert. Groups are kept together on nodes where the number of
    nodes divides that of groups; elsewhere nodes make no difference.

    Raises:
        ValueError: the numbers do not divide, or there are too few or too many slots.
    """

    num_logical: int
    num_physical: int
    num_ranks: int
    num_nodes: int = 1
    num_groups: int = 1
    min_replicas: int = 1

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        for whole, part in (("num_physical", "num_ranks"), ("num_ranks", "num_nodes"), ("num_logical", "num_groups")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{part} ({getattr(self, part)}) does not divide {whole} ({getattr(self, whole)})")
        if self.min_replicas > self.ranks_per_part:
            raise ValueError(f"{self.min_replicas} copies of an expert do not fit on {self.ranks_per_part} ranks, one on each")
        least, most = self.num_logical * self.min_replicas, self.num_logical * self.ranks_per_part
        if not least <= self.num_physical <= most:
            raise ValueError(f"{self.num_logical} experts take {least} to {most} slots, not {self.num_physical}")

    @property
    def slots_per_rank(self) -> int:
        return self.num_physical // self.num_ranks

    @property
    def num_parts(self) -> int:
        """Nodes that are balanced each for itself: all of them if they divide the groups, else the cluster as one."""
        return self.num_nodes if self.num_groups % self.num_nodes == 0 else 1

    @property
    def ranks_per_part(self) -> int:
        return self.num_ranks // self.num_parts

    @property
    def group_size(self) -> int:
        return self.num_logical // self.num_groups


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """Where the experts are.

    Attributes:
        physical_to_logical: [layers][num_physical].
        logical_to_physical: [layers][num_logical][copies of it], ascending.
    """

    layout: ExpertLayout
    physical_to_logical: tuple[tuple[int, ...], ...]
    logical_to_physical: tuple[tuple[tuple[int, ...], ...], ...]

    @classmethod
    def of(cls, layout: ExpertLayout, layers: Sequence[Sequence[int]]) -> ExpertPlacement:
        """From `physical_to_logical` alone: [layers][num_physical]."""
        logical_to_physical = []
        for experts in layers:
            where: list[list[int]] = [[] for _ in range(layout.num_logical)]
            for physical, expert in enumerate(experts):
                where[expert].append(physical)
            logical_to_physical.append(tuple(map(tuple, where)))
        return cls(layout, tuple(map(tuple, layers)), tuple(logical_to_physical))

    def num_replicas(self, layer: int) -> tuple[int, ...]:
        """[num_logical] copies of each expert."""
        return tuple(map(len, self.logical_to_physical[layer]))

    def rank_loads(self, layer: int, loads: Sequence[float]) -> list[float]:
        """[num_ranks] of a layer, if each expert's load [num_logical] is shared evenly by its copies."""
        counts, size = self.num_replicas(layer), self.layout.slots_per_rank
        shares = [loads[expert] / counts[expert] for expert in self.physical_to_logical[layer]]
        return [sum(shares[start : start + size]) for start in range(0, len(shares), size)]


class ExpertMove(NamedTuple):
    """Slot `physical` of a layer gets the weights of `logical`, which `from_rank` had before; `to_rank` has the slot."""

    layer: int
    physical: int
    logical: int
    from_rank: int
    to_rank: int


def count_replicas(loads: Sequence[float], *, num_physical: int, max_replicas: int, min_replicas: int = 1) -> list[int]:
    """[experts] copies of each: every further slot goes to the expert with the largest load a copy.

    That makes the largest load a copy as small as it can be. `loads` are [experts]; O((experts + slots) log experts). Ties go
    to the expert with fewer copies, then to the lower number.
    """
    counts = [min_replicas] * len(loads)
    heap = [(-load / min_replicas, min_replicas, expert) for expert, load in enumerate(loads) if min_replicas < max_replicas]
    heapq.heapify(heap)
    for _ in range(num_physical - min_replicas * len(loads)):
        _, count, expert = heap[0]
        counts[expert] = count + 1
        if count + 1 < max_replicas:
            heapq.heapreplace(heap, (-loads[expert] / (count + 1), count + 1, expert))
        else:
            heapq.heappop(heap)
    return counts


def place_experts(loads: Loads, layout: ExpertLayout) -> ExpertPlacement:
    """A placement from nothing.

    Groups go to nodes, then each node's slots to copies of its experts, then copies to its ranks. O(n log n) a layer.

    Raises:
        ValueError: `loads` have another shape, or are negative or not finite.
    """
    _check_loads(loads, layout)
    return _placement(layout, [_place_layer(layer_loads, layout) for layer_loads in loads])


def rebalance_experts(
    loads: Loads, old: ExpertPlacement, *, tolerance: float = 1.05
) -> tuple[ExpertPlacement, list[ExpertMove]]:
    """A placement for new loads that keeps experts where they are, and the moves that lead to it.

    No layer's largest rank load is over `tolerance` times that of `place_experts`. Copies that are one too many are dropped,
    missing ones take their slots, and experts are swapped between ranks only while the bound is exceeded. Moves read what was
    there before all of them: an expert's old slot may be overwritten by another move.

    Raises:
        ValueError: as for `place_experts`, or `tolerance` is below 1.
    """
    layout = old.layout
    _check_loads(loads, layout)
    if len(loads) != len(old.physical_to_logical):
        raise ValueError(f"loads of {len(loads)} layers, and a placement of {len(old.physical_to_logical)}")
    if tolerance < 1:
        raise ValueError(f"tolerance is at least 1, not {tolerance}")
    layers = [
        _replace_layer(layer_loads, layout, _by_rank(was, layout), tolerance)
        for layer_loads, was in zip(loads, old.physical_to_logical, strict=True)
    ]
    new = _placement(layout, layers)
    return new, _moves(old, new)


def _check_loads(loads: Loads, layout: ExpertLayout) -> None:
    for layer, layer_loads in enumerate(loads):
        if len(layer_loads) != layout.num_logical:
            raise ValueError(f"layer {layer} has loads of {len(layer_loads)} experts, not {layout.num_logical}")
        if not all(load >= 0 and math.isfinite(load) for load in layer_loads):
            raise ValueError(f"layer {layer} has a load that is negative or not finite")


def _place_layer(loads: Sequence[float], layout: ExpertLayout) -> list[list[int]]:
    """[ranks][slots] logical experts."""
    group_loads = _group_loads(loads, layout)
    nodes = Packs(layout.num_parts, layout.num_groups // layout.num_parts, group_loads)
    nodes.fill([1] * layout.num_groups)
    ranks: list[list[int]] = []
    for groups in nodes.slots:
        counts, weights = _copies(loads, layout, groups)
        packs = Packs(layout.ranks_per_part, layout.slots_per_rank, weights)
        packs.fill(counts)
        ranks += packs.slots
    return ranks


def _replace_layer(loads: Sequence[float], layout: ExpertLayout, old: list[list[int]], tolerance: float) -> list[list[int]]:
    """[ranks][slots] from the same before."""
    fresh = _place_layer(loads, layout)
    max_load = tolerance * _max_load(fresh, loads)
    kept = _keep_layer(loads, layout, old, max_load)
    if _max_load(kept, loads) > max_load:
        kept = _aligned(fresh, old, layout.ranks_per_part)
    return [_settled(now, was) for now, was in zip(kept, old, strict=True)]


def _keep_layer(loads: Sequence[float], layout: ExpertLayout, old: list[list[int]], max_load: float) -> list[list[int]]:
    group_loads = _group_loads(loads, layout)
    nodes = Packs(layout.num_parts, layout.num_groups // layout.num_parts, group_loads)
    parts = [old[start : start + layout.ranks_per_part] for start in range(0, layout.num_ranks, layout.ranks_per_part)]
    groups_of = [sorted({expert // layout.group_size for rank in part for expert in rank}) for part in parts]
    nodes.keep(groups_of, [1] * layout.num_groups)
    nodes.fill([1] * layout.num_groups)
    nodes.balance(max_load * layout.ranks_per_part)
    ranks: list[list[int]] = []
    for groups, part in zip(nodes.slots, parts, strict=True):
        counts, weights = _copies(loads, layout, groups)
        packs = Packs(layout.ranks_per_part, layout.slots_per_rank, weights)
        packs.keep(part, counts)
        packs.fill(counts)
        packs.balance(max_load)
        ranks += packs.slots
    return ranks


def _group_loads(loads: Sequence[float], layout: ExpertLayout) -> list[float]:
    size = layout.group_size
    return [sum(loads[start : start + size]) for start in range(0, len(loads), size)]


def _copies(loads: Sequence[float], layout: ExpertLayout, groups: Sequence[int]) -> tuple[list[int], list[float]]:
    """[num_logical] copies and load a copy of the experts in these groups; 0 for all others."""
    size = layout.group_size
    experts = [expert for group in sorted(groups) for expert in range(group * size, (group + 1) * size)]
    num_copies = count_replicas(
        [loads[expert] for expert in experts],
        num_physical=layout.num_physical // layout.num_parts,
        max_replicas=layout.ranks_per_part,
        min_replicas=layout.min_replicas,
    )
    counts, weights = [0] * layout.num_logical, [0.0] * layout.num_logical
    for expert, count in zip(experts, num_copies, strict=True):
        counts[expert], weights[expert] = count, loads[expert] / count
    return counts, weights


def _max_load(ranks: list[list[int]], loads: Sequence[float]) -> float:
    counts = [0] * len(loads)
    for rank in ranks:
        for expert in rank:
            counts[expert] += 1
    return max(sum(loads[expert] / counts[expert] for expert in rank) for rank in ranks)


def _aligned(fresh: list[list[int]], old: list[list[int]], ranks_per_part: int) -> list[list[int]]:
    """The same packs, node by node, in an order that leaves much where it is: the pair with the largest overlap first."""
    ordered: list[list[int]] = [[] for _ in old]
    num_parts = len(old) // ranks_per_part

    def match(new_sets: list[set[int]], old_sets: list[set[int]]) -> list[int]:
        pairs = [(-len(n & o), i, j) for i, n in enumerate(new_sets) for j, o in enumerate(old_sets)]
        place, taken = [FREE] * len(new_sets), [False] * len(old_sets)
        for _, i, j in sorted(pairs):
            if place[i] == FREE and not taken[j]:
                place[i], taken[j] = j, True
        return place

    def part(ranks: list[list[int]], number: int) -> list[list[int]]:
        return ranks[number * ranks_per_part : (number + 1) * ranks_per_part]

    def union(ranks: list[list[int]]) -> set[int]:
        return {expert for rank in ranks for expert in rank}

    parts = range(num_parts)
    nodes = match([union(part(fresh, n)) for n in parts], [union(part(old, n)) for n in parts])
    for number, node in enumerate(nodes):
        packs = part(fresh, number)
        places = match([set(pack) for pack in packs], [set(pack) for pack in part(old, node)])
        for pack, place in zip(packs, places, strict=True):
            ordered[node * ranks_per_part + place] = pack
    return ordered


def _settled(now: list[int], was: list[int]) -> list[int]:
    """A rank's experts in the slots that they had; the others in those that are left, in order."""
    staying = set(now) & set(was)
    coming = iter([expert for expert in now if expert not in staying])
    return [expert if expert in staying else next(coming) for expert in was]


def _by_rank(slots: Sequence[int], layout: ExpertLayout) -> list[list[int]]:
    size = layout.slots_per_rank
    return [list(slots[start : start + size]) for start in range(0, len(slots), size)]


def _placement(layout: ExpertLayout, layers: list[list[list[int]]]) -> ExpertPlacement:
    return ExpertPlacement.of(layout, [[expert for rank in ranks for expert in rank] for ranks in layers])


def _moves(old: ExpertPlacement, new: ExpertPlacement) -> list[ExpertMove]:
    """Where an expert has several old ranks, those of the receiver's node go first, then the one that has sent least."""
    layout, size = new.layout, new.layout.slots_per_rank
    ranks_per_node = layout.num_ranks // layout.num_nodes
    moves = []
    num_sent = [0] * layout.num_ranks
    for layer, (was, now) in enumerate(zip(old.physical_to_logical, new.physical_to_logical, strict=True)):
        for physical, expert in enumerate(now):
            if was[physical] == expert:
                continue
            to_rank = physical // size
            sources = [slot // size for slot in old.logical_to_physical[layer][expert]]
            from_rank = min(
                sources, key=lambda rank: (rank // ranks_per_node != to_rank // ranks_per_node, num_sent[rank], rank)
            )
            num_sent[from_rank] += 1
            moves.append(ExpertMove(layer, physical, expert, from_rank, to_rank))
    return moves
