"""When experts move, and where to: the leader's side of EPLB, from measured loads to the orders of each step.

Life cycle: `orders(step_id)` is asked once for each step, in order; every `interval_steps` it orders the loads to be read, and
`observe` gets them once they have come, some steps later. Then the layers are looked at one after the other, one a step, so
that no step waits for a whole model's placement: a layer whose fullest rank would have `min_gain` less gets its new placement
(eplb.py) in a few writes a step (expert_writes.py). All ranks follow the same orders with the same step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ..common.errors import ConfigError
from .eplb import ExpertLayout, ExpertPlacement, place_experts, rebalance_experts
from .expert_writes import after_writes, next_writes
from .step_plan import ExpertOrders, SlotWrite

_DECAY = 0.5  # of what was measured before, at each reading


@dataclass(frozen=True, kw_only=True, slots=True)
class Rebalance:
    """One round over all layers.

    Balances are the load of each layer's fullest rank over that of its mean rank, of all layers together: 1 is perfect.

    Attributes:
        step_id: with which the last layer was in place.
        measured: by the loads that led to it, with the experts where they were.
        expected: by the same loads, with the experts where they are now.
    """

    step_id: int
    measured: float
    expected: float
    num_layers: int
    num_writes: int


def expert_layout(num_experts: int, *, num_redundant: int, num_ranks: int) -> ExpertLayout:
    """The slots of each layer. With a redundant slot for every expert each has two ranks, and no lost rank takes one with it.

    Raises:
        ConfigError: ranks would have unequal numbers of slots, or more than there are experts; it says what would fit.
    """
    num_slots = num_experts + num_redundant
    if num_slots % num_ranks:
        more = -num_slots % num_ranks
        raise ConfigError(
            f"{num_experts} experts and {num_redundant} redundant ones do not fill the slots of {num_ranks} ranks evenly: "
            f"use redundant_experts {num_redundant + more}"
        )
    if num_slots > num_experts * num_ranks:
        raise ConfigError(
            f"redundant_experts {num_redundant} is more than {num_experts} experts on {num_ranks} ranks have use for: "
            f"use at most {num_experts * (num_ranks - 1)}"
        )
    copies = min(2, num_slots // num_experts)
    return ExpertLayout(num_logical=num_experts, num_physical=num_slots, num_ranks=num_ranks, min_replicas=copies)


def first_slots(num_experts: int, *, num_redundant: int, num_ranks: int) -> tuple[int, ...]:
    """[slots] the expert in each, in every layer, before anything is measured. Raises ConfigError as `expert_layout`."""
    layout = expert_layout(num_experts, num_redundant=num_redundant, num_ranks=num_ranks)
    return place_experts([[1.0] * num_experts], layout).physical_to_logical[0]


class ExpertBalancer:
    """See the module.

    Args:
        slots: the expert in each, in every layer, at the start.
        writes_per_step: a rank's, and as many slots may it read.

    Attributes:
        measured: balance (see Rebalance) by the last loads, 0 before any came.
        num_writes: since the start.
        last: the last round that moved anything.
    """

    def __init__(
        self,
        slots: Sequence[int],
        layout: ExpertLayout,
        *,
        num_layers: int,
        interval_steps: int,
        writes_per_step: int,
        min_gain: float = 0.1,
    ) -> None:
        self.measured = 0.0
        self.num_writes = 0
        self.last: Rebalance | None = None
        self._layout, self._interval, self._limit, self._min_gain = layout, interval_steps, writes_per_step, min_gain
        self._slots = [list(slots) for _ in range(num_layers)]
        self._loads: list[list[float]] = [[0.0] * layout.num_logical for _ in range(num_layers)]
        self._waiting: deque[int] = deque()  # layers of this round that were not looked at
        self._is_round = False
        self._layer, self._target = 0, self._slots[0]  # on its way, or there
        self._found: list[float] = []  # of the layers that were looked at: the fullest rank's load before
        self._expected: list[float] = []  # and after
        self._num_layers = self._num_writes_before = 0  # of this round that move; self.num_writes at its start

    def orders(self, step_id: int) -> ExpertOrders | None:
        """What the step does with experts, None if nothing."""
        if self._is_there and self._waiting:
            self._look_at(self._waiting.popleft())
        writes: tuple[SlotWrite, ...] = ()
        if not self._is_there:
            now = self._slots[self._layer]
            writes = next_writes(now, self._target, slots_per_rank=self._layout.slots_per_rank, limit=self._limit)
            self._slots[self._layer] = after_writes(now, writes)
            self.num_writes += len(writes)
        if self._is_round and self._is_there and not self._waiting:
            self._end_round(step_id)
        reads_loads = step_id % self._interval == 0
        return ExpertOrders(reads_loads, self._layer, writes) if reads_loads or writes else None

    def observe(self, loads: Sequence[Sequence[float]]) -> None:
        """Takes [layers][experts] tokens since the reading before. A round that is under way goes on with what it knows."""
        if self._is_round or not any(map(any, loads)):
            return
        self._loads = [
            [_DECAY * old + new for old, new in zip(*layer, strict=True)] for layer in zip(self._loads, loads, strict=True)
        ]
        self._waiting.extend(range(len(self._slots)))
        self._is_round, self._found, self._expected = True, [], []
        self._num_layers, self._num_writes_before = 0, self.num_writes

    @property
    def _is_there(self) -> bool:
        return self._slots[self._layer] == self._target

    def _look_at(self, layer: int) -> None:
        loads, old = self._loads[layer], ExpertPlacement.of(self._layout, [self._slots[layer]])
        new, _ = rebalance_experts([loads], old)
        found, expected = (max(placement.rank_loads(0, loads)) for placement in (old, new))
        self._layer, self._target = layer, self._slots[layer]
        if expected < found * (1 - self._min_gain):
            self._target = list(new.physical_to_logical[0])
            self._num_layers += 1
        self._found.append(found)
        self._expected.append(expected if self._target is not self._slots[layer] else found)

    def _end_round(self, step_id: int) -> None:
        self._is_round = False
        self.measured = self._balance(self._found)
        if self._num_layers:
            self.last = Rebalance(
                step_id=step_id,
                measured=self.measured,
                expected=self._balance(self._expected),
                num_layers=self._num_layers,
                num_writes=self.num_writes - self._num_writes_before,
            )

    def _balance(self, max_loads: Sequence[float]) -> float:
        return sum(max_loads) * self._layout.num_ranks / sum(map(sum, self._loads))
