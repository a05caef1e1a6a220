"""The leader's part of expert balancing: each step gets its orders, and loads that have come from the device are looked at.

It waits for nothing: loads that a step has read are taken with the first step after they have arrived. Of several data ranks
the first one's leader directs, and the others hear its orders when they agree on the step (step_agreement.py).
"""

from __future__ import annotations

import logging

from ..common.rank_place import RankPlace
from ..common.requests import ExpertBalance
from ..scheduler.expert_balancer import ExpertBalancer, expert_layout, first_slots
from ..scheduler.step_plan import ExpertOrders
from .expert_mover import ExpertMover
from .model_runner import PendingStep

logger = logging.getLogger(__name__)


class ExpertDirector:
    """Directs the movers of all ranks, of which the leader's is `mover`."""

    def __init__(self, mover: ExpertMover, place: RankPlace) -> None:
        sizes = {"num_redundant": place.num_redundant_experts, "num_ranks": place.num_ranks}
        self._balancer = ExpertBalancer(
            first_slots(mover.num_experts, **sizes),
            expert_layout(mover.num_experts, **sizes),
            num_layers=mover.num_layers,
            interval_steps=place.rebalance_interval_steps,
            writes_per_step=mover.writes_per_step,
        )
        self._reading: PendingStep | None = None
        self._next_step_id = 1
        self._next: ExpertOrders | None = None
        self._has_next = False

    @property
    def balance(self) -> ExpertBalance:
        last = self._balancer.last
        return ExpertBalance(
            measured=self._balancer.measured,
            expected=last.expected if last is not None else self._balancer.measured,
            num_moves=self._balancer.num_writes,
            last_step_id=last.step_id if last is not None else 0,
        )

    def next_orders(self) -> ExpertOrders | None:
        """Of the step that will be launched next: the same until it is."""
        if not self._has_next:
            self._take_loads()
            self._next, self._has_next = self._balancer.orders(self._next_step_id), True
        return self._next

    def launched(self, step: PendingStep) -> None:
        """The step of these orders runs; of every step, in order."""
        assert step.plan.step_id == self._next_step_id, "a step without orders was launched"
        self._next_step_id, self._has_next = self._next_step_id + 1, False
        if step.expert_loads is not None:
            self._reading = step
        if (last := self._balancer.last) is not None and last.step_id == step.plan.step_id:
            logger.info(
                "step %d: %d experts have moved in %d layers; the fullest rank had %.2f of the mean load, %.2f is expected",
                last.step_id,
                last.num_writes,
                last.num_layers,
                last.measured,
                last.expected,
            )

    def _take_loads(self) -> None:
        if self._reading is not None and self._reading.has_arrived:
            assert self._reading.expert_loads is not None
            self._balancer.observe(self._reading.expert_loads.tolist())
            self._reading = None
