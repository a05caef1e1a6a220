"""Prometheus metrics: counted from what the service reports, and from the cluster's state when they are read.

Each Metrics has a registry of its own, so that two controllers can live in one process.
"""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..common.cluster_state import ClusterState, ReplicaState
from ..common.requests import StepOutput
from .events import RequestRecord

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)


class Metrics:
    """An Observer of the service; `render` gives the text that Prometheus reads."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "pilotfish_requests_total", "Requests ended, by outcome (ok or an error code).", ("outcome",), registry=registry
        )
        self._prompt_tokens = Counter("pilotfish_prompt_tokens_total", "Prompt tokens of ended requests.", registry=registry)
        self._hit_tokens = Counter(
            "pilotfish_prefix_hit_tokens_total", "Prompt tokens that a prefix cache saved.", registry=registry
        )
        self._output_tokens = Counter("pilotfish_output_tokens_total", "Tokens produced for ended requests.", registry=registry)
        self._recoveries = Counter(
            "pilotfish_recoveries_total", "Times that a request went on on another replica.", registry=registry
        )
        self._queue_wait = self._histogram("pilotfish_queue_wait_seconds", "From arrival until a replica had room.", _SECONDS)
        self._ttft = self._histogram("pilotfish_ttft_seconds", "From arrival to the first token.", _SECONDS)
        self._duration = self._histogram("pilotfish_request_seconds", "From arrival to the end.", _SECONDS)
        self._tpot = self._histogram("pilotfish_tpot_seconds", "Time a token after the first.", _STEP_SECONDS)
        self._steps = Histogram(
            "pilotfish_step_seconds", "One engine step.", ("replica",), buckets=_STEP_SECONDS, registry=registry
        )
        self._batched = Counter(
            "pilotfish_batched_tokens_total", "Tokens computed in engine steps.", ("replica",), registry=registry
        )
        self._queued = Gauge("pilotfish_queue_depth", "Sequences that wait for a replica.", registry=registry)
        self._running = Gauge("pilotfish_running", "Sequences on replicas.", registry=registry)
        self._replicas = Gauge("pilotfish_replicas", "Replicas by state.", ("state",), registry=registry)
        self._restarts = Gauge("pilotfish_replica_restarts", "Worker restarts since the controller started.", registry=registry)
        self._kv_usage = Gauge(
            "pilotfish_kv_usage_ratio", "KV blocks used by running sequences, of all.", ("replica",), registry=registry
        )
        self._preemptions = Gauge(
            "pilotfish_preemptions", "Preemptions since the engine started.", ("replica",), registry=registry
        )

        self._expert_balance = Gauge(
            "pilotfish_expert_balance_ratio",
            "Tokens that the fullest rank's experts got over the mean rank's, as last measured.",
            ("replica",),
            registry=registry,
        )
        self._expected_balance = Gauge(
            "pilotfish_expected_expert_balance_ratio",
            "The same as the last round of moves expected it.",
            ("replica",),
            registry=registry,
        )
        self._expert_moves = Gauge(
            "pilotfish_expert_moves", "Experts moved or copied since the engine started.", ("replica",), registry=registry
        )

    def on_request_end(self, record: RequestRecord) -> None:
        usage = record.usage
        self._requests.labels(record.error_code or "ok").inc()
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._hit_tokens.inc(usage.cached_tokens)
        self._output_tokens.inc(usage.completion_tokens)
        self._recoveries.inc(max(0, record.num_attempts - 1))
        self._duration.observe(usage.total_ms / 1000)
        if record.has_first_token:
            self._queue_wait.observe(usage.queue_ms / 1000)
            self._ttft.observe(usage.ttft_ms / 1000)
            per_choice = usage.completion_tokens / max(1, len(record.finish_reasons))
            if per_choice > 1:
                self._tpot.observe((usage.total_ms - usage.ttft_ms) / 1000 / (per_choice - 1))

    def on_refused(self, error_code: str) -> None:
        self._requests.labels(error_code).inc()

    def on_step(self, replica: str, step: StepOutput) -> None:
        self._steps.labels(replica).observe(step.timings.total_ms / 1000)
        self._batched.labels(replica).inc(step.num_batched_tokens)

    def render(self, state: ClusterState) -> tuple[bytes, str]:
        """The exposition text and its media type."""
        self._queued.set(state.num_queued)
        self._running.set(state.num_running)
        self._restarts.set(state.num_restarts)
        for kind in ReplicaState:
            self._replicas.labels(kind.value).set(sum(replica.state is kind for replica in state.replicas))
        for replica in state.replicas:
            load = replica.load
            total = load.num_free_blocks + load.num_cached_blocks + load.num_used_blocks
            self._kv_usage.labels(replica.name).set(load.num_used_blocks / total if total else 0.0)
            self._preemptions.labels(replica.name).set(load.num_preemptions)
            if (balance := load.expert_balance) is not None:
                self._expert_balance.labels(replica.name).set(balance.measured)
                self._expected_balance.labels(replica.name).set(balance.expected)
                self._expert_moves.labels(replica.name).set(balance.num_moves)
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, help_text, buckets=buckets, registry=self._registry)
