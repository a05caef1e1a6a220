"""Looks at the cluster once a second, asks the policy (scheduler/autoscaling.py), and resizes the fleet.

A fleet without a replica is looked at more often: a request waits. A replica that could not be started stays in the fleet's
status for a while, to be seen with its reason, and no other is added meanwhile; then it is forgotten, and the policy may try
again. A fleet of a fixed number is left alone, and any during a
rollout.
"""

from __future__ import annotations

import asyncio
import logging
import time

from ..common.cluster_state import ReplicaState, ScalingState
from ..common.config import FleetConfig
from ..scheduler.autoscaling import ScalingConfig, ScalingPolicy, ScalingSample
from .dispatcher import Dispatcher
from .fleet import Fleet
from .replica import Replica
from .rollout import Rollout

logger = logging.getLogger(__name__)

_INTERVAL_S = 1.0
_INTERVAL_WITHOUT_REPLICA_S = 0.1
_FAILURE_PAUSE_S = 60.0


class Autoscaler:
    """`run` until cancelled; `state` at any time."""

    def __init__(self, config: FleetConfig, *, fleet: Fleet, dispatcher: Dispatcher, rollout: Rollout) -> None:
        self._config = config
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._rollout = rollout
        self._policy = ScalingPolicy(
            ScalingConfig(
                min_replicas=config.fewest,
                max_replicas=config.most,
                target_wait_ms=config.target_wait_s * 1000,
                down_ticks=int(config.shrink_after_s * 1000),
                idle_ticks=int(config.idle_timeout_s * 1000),
            )
        )
        self._failed_since: dict[str, float] = {}
        self._num_up = self._num_down = 0
        self._reason = ""
        self._decided = 0.0

    async def run(self) -> None:
        if not self._config.is_elastic:
            return
        while True:
            await asyncio.sleep(_INTERVAL_S if self._fleet.staying else _INTERVAL_WITHOUT_REPLICA_S)
            if not self._rollout.is_under_way:
                self._forget_failures()
                self._decide()

    def state(self) -> ScalingState:
        return ScalingState(
            min_replicas=self._config.fewest,
            max_replicas=self._config.most,
            num_wanted=len(self._fleet.staying),
            num_up=self._num_up,
            num_down=self._num_down,
            reason=self._reason,
            decided_age_s=time.monotonic() - self._decided if self._reason else 0.0,
        )

    def _decide(self) -> None:
        sample = self._sample()
        decision = self._policy.decide(sample)
        if decision is None:
            return
        num_now = sample.num_ready + sample.num_starting
        is_up = decision.num_wanted > num_now
        self._num_up += is_up
        self._num_down += not is_up
        self._reason, self._decided = f"from {num_now} to {decision.num_wanted}: {decision.reason}", time.monotonic()
        logger.info("replicas %s", self._reason)
        self._fleet.resize(decision.num_wanted, decision.reason)

    def _sample(self) -> ScalingSample:
        staying, demand, info = self._fleet.staying, self._dispatcher.demand(), self._fleet.info()
        ready = [replica for replica in staying if replica.state is ReplicaState.READY]
        num_failed = sum(replica.state is ReplicaState.FAILED for replica in staying)
        return ScalingSample(
            tick=int(time.monotonic() * 1000),
            num_ready=len(ready),
            num_starting=len(staying) - len(ready) - num_failed,
            num_failed=num_failed,
            num_places=info.max_num_seqs * max((len(replica.places) for replica in ready), default=1) if info else 1,
            num_running=demand.num_running,
            num_queued=demand.num_queued,
            num_batch=demand.num_batch,
            kv_usage=_kv_usage(ready),
            wait_ms=demand.wait_ms,
        )

    def _forget_failures(self) -> None:
        """Those that are old enough."""
        now = time.monotonic()
        failed = [replica for replica in self._fleet.staying if replica.state is ReplicaState.FAILED]
        self._failed_since = {replica.name: self._failed_since.get(replica.name, now) for replica in failed}
        for replica in failed:
            if now - self._failed_since[replica.name] >= _FAILURE_PAUSE_S:
                self._fleet.let_go(replica, f"it could not be started: {replica.message}", within_s=0.0)


def _kv_usage(replicas: list[Replica]) -> float:
    loads = [place.link.load for replica in replicas for place in replica.places if place.link is not None]
    num_blocks = sum(load.num_used_blocks + load.num_cached_blocks + load.num_free_blocks for load in loads)
    return sum(load.num_used_blocks for load in loads) / num_blocks if num_blocks else 0.0
