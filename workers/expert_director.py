"""The leader's part of expert balancing: each plan gets its orders, and loads that have come from the device are looked at.

It waits for nothing: loads that a step has read are taken with the first plan after they have arrived.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from ..common.rank_place import RankPlace
from ..common.requests import ExpertBalance
from ..scheduler.expert_balancer import ExpertBalancer, expert_layout, first_slots
from ..scheduler.step_plan import StepPlan
from .expert_mover import ExpertMover
from .model_runner import PendingStep

logger = logging.getLogger(__name__)


class ExpertDirector:
    """Directs the movers of all ranks, of which the leader's is `mover`."""

    def __init__(self, mover: ExpertMover, place: RankPlace) -> None:
        sizes = {"num_redundant": place.num_redundant_experts, "num_ranks": place.size}
        self._balancer = ExpertBalancer(
            first_slots(mover.num_experts, **sizes),
            expert_layout(mover.num_experts, **sizes),
            num_layers=mover.num_layers,
            interval_steps=place.rebalance_interval_steps,
            writes_per_step=mover.writes_per_step,
        )
        self._reading: PendingStep | None = None

    @property
    def balance(self) -> ExpertBalance:
        last = self._balancer.last
        return ExpertBalance(
            measured=self._balancer.measured,
            expected=last.expected if last is not None else self._balancer.measured,
            num_moves=self._balancer.num_writes,
            last_step_id=last.step_id if last is not None else 0,
        )

    def direct(self, plan: StepPlan) -> StepPlan:
        """The plan with its orders; of every plan, in order."""
        if self._reading is not None and self._reading.has_arrived:
            assert self._reading.expert_loads is not None
            self._balancer.observe(self._reading.expert_loads.tolist())
            self._reading = None
        before = self._balancer.last
        orders = self._balancer.orders(plan.step_id)
        if (last := self._balancer.last) is not None and last is not before:
            logger.info(
                "step %d: %d experts have moved in %d layers; the fullest rank had %.2f of the mean load, %.2f is expected",
                last.step_id,
                last.num_writes,
                last.num_layers,
                last.measured,
                last.expected,
            )
        return replace(plan, experts=orders) if orders is not None else plan

    def launched(self, step: PendingStep) -> None:
        """The step of the plan that was directed last runs."""
        if step.expert_loads is not None:
            self._reading = step
