"""Prometheus metrics of what the cluster is at the moment it is asked, made from its state.

Only what is there has a sample: a replica that was lost or removed has none, so that nothing stale is read as load.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..common.cluster_state import ClusterState, ReplicaState, ReplicaStatus

_GONE = (ReplicaState.LOST, ReplicaState.FAILED)
BLOCK_KINDS = ("used", "cached", "free")


class StateCollector(Collector):
    """Set `state` before each reading; there is nothing to read before the first."""

    state: ClusterState | None = None

    def describe(self) -> list[Metric]:
        """Nothing: the registry would read the state at once, to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        if self.state is None:
            return
        yield from _of_cluster(self.state)
        yield from _of_replicas([replica for replica in self.state.replicas if replica.state not in _GONE])


def _of_cluster(state: ClusterState) -> Iterator[Metric]:
    yield GaugeMetricFamily("pilotfish_queued_sequences", "Sequences that wait for a replica.", value=state.num_queued)
    yield GaugeMetricFamily("pilotfish_running_sequences", "Sequences on replicas.", value=state.num_running)
    yield GaugeMetricFamily("pilotfish_uptime_seconds", "Since the controller started.", value=state.uptime_s)
    yield CounterMetricFamily("pilotfish_replica_restarts_total", "Workers started again.", value=state.num_restarts)
    wanted = state.scaling.num_wanted
    yield GaugeMetricFamily("pilotfish_wanted_replicas", "Replicas that there are to be, for the load as it is.", value=wanted)
    decisions = CounterMetricFamily(
        "pilotfish_scaling_decisions_total", "Decisions for more replicas (up) and for fewer (down).", labels=("direction",)
    )
    decisions.add_metric(("up",), state.scaling.num_up)
    decisions.add_metric(("down",), state.scaling.num_down)
    yield decisions
    replicas = GaugeMetricFamily("pilotfish_replicas", "Replicas (or data ranks of them) by state.", labels=("state",))
    for kind in ReplicaState:
        replicas.add_metric((kind.value,), sum(replica.state is kind for replica in state.replicas))
    yield replicas


def _of_replicas(replicas: list[ReplicaStatus]) -> Iterator[Metric]:
    blocks = GaugeMetricFamily(
        "pilotfish_kv_blocks", "KV blocks: used by running sequences, cached for prefixes, free.", labels=("replica", "kind")
    )
    usage = _gauge("kv_usage_ratio", "KV blocks used by running sequences, of all.")
    running = _gauge("engine_running_sequences", "Sequences in the engine's steps.")
    waiting = _gauge("engine_waiting_sequences", "Sequences that wait inside the engine.")
    step_age = _gauge("step_age_seconds", "How long the step that runs now has been running; 0 when idle.")
    preemptions = CounterMetricFamily(
        "pilotfish_preemptions_total", "Sequences that had to give up their KV blocks.", labels=("replica",)
    )
    paused = CounterMetricFamily(
        "pilotfish_engine_paused_seconds_total",
        "Time in which the engine paused since the controller could not follow, of this worker.",
        labels=("replica",),
    )
    measured = _gauge(
        "expert_balance_ratio", "Tokens that the fullest rank's experts got over the mean rank's, as last measured."
    )
    expected = _gauge("expected_expert_balance_ratio", "The same as the last round of moves expected it.")
    moves = CounterMetricFamily("pilotfish_expert_moves_total", "Experts moved or copied.", labels=("replica",))
    drifts = {
        unit: _gauge(f"router_drift_{unit}", f"{unit.capitalize()} that the router counts on a replica less what it reports.")
        for unit in ("requests", "tokens", "blocks")
    }
    for replica in replicas:
        load, labels = replica.load, (replica.name,)
        counts = (load.num_used_blocks, load.num_cached_blocks, load.num_free_blocks)
        for kind, count in zip(BLOCK_KINDS, counts, strict=True):
            blocks.add_metric((replica.name, kind), count)
        usage.add_metric(labels, load.num_used_blocks / sum(counts) if sum(counts) else 0.0)
        running.add_metric(labels, load.num_running)
        waiting.add_metric(labels, load.num_waiting)
        step_age.add_metric(labels, replica.last_step_age_s)
        preemptions.add_metric(labels, load.num_preemptions)
        paused.add_metric(labels, replica.paused_s)
        if replica.routing is not None:
            for unit, family in drifts.items():
                family.add_metric(labels, getattr(replica.routing, f"drift_{unit}"))
        if (balance := load.expert_balance) is not None:
            measured.add_metric(labels, balance.measured)
            expected.add_metric(labels, balance.expected)
            moves.add_metric(labels, balance.num_moves)
    yield from (blocks, usage, running, waiting, step_age, preemptions, paused, measured, expected, moves, *drifts.values())


def _gauge(name: str, text: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"pilotfish_{name}", text, labels=("replica",))
