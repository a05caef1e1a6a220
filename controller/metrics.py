"""Prometheus metrics of what happens: counted from what the service and the dispatcher report.

What the cluster *is* when it is asked (queue, blocks, replicas) comes from its state: state_metrics.py. Each Metrics has a
registry of its own, so that two controllers can live in one process. Names carry units; every label has few values: outcomes
are the codes of common/errors.py, replicas those of the fleet. docs/operating.md has the table, which a test keeps true.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ..common.cluster_state import ClusterState
from ..common.requests import StepOutput
from .events import Observer, RequestRecord
from .state_metrics import StateCollector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEP_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)
STEP_PARTS = ("plan", "forward", "sample")


class Metrics(Observer):
    """An Observer of the service and the dispatcher; `render` gives the text that Prometheus reads."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests_total", "Requests ended, by outcome (ok or an error code).", ("outcome",))
        self._prompt_tokens = self._counter("prompt_tokens_total", "Prompt tokens of ended requests.")
        self._hit_tokens = self._counter(
            "prefix_hit_tokens_total", "Prompt tokens that a prefix cache saved, of ended requests."
        )
        self._output_tokens = self._counter("output_tokens_total", "Tokens produced for ended requests.")
        self._recoveries = self._counter("recoveries_total", "Times that a request went on on another replica.")
        self._queue_wait = self._histogram("queue_wait_seconds", "From arrival until a replica had room.", _SECONDS)
        self._ttft = self._histogram("ttft_seconds", "From arrival to the first token.", _SECONDS)
        self._duration = self._histogram("request_seconds", "From arrival to the end.", _SECONDS)
        self._tpot = self._histogram("tpot_seconds", "Time a token after the first, the mean of a request.", _STEP_SECONDS)
        self._inter_token = TokenGaps(_STEP_SECONDS)
        self._registry.register(self._inter_token)
        self._steps = self._histogram("step_seconds", "One engine step.", _STEP_SECONDS, ("replica",))
        self._step_parts = self._counter(
            "step_part_seconds_total",
            "Time in the parts of engine steps; over the steps' count it is a part's mean.",
            ("replica", "part"),
        )
        self._batched = self._counter("batched_tokens_total", "Tokens computed in engine steps.", ("replica",))
        self._generated = self._counter("generated_tokens_total", "Tokens produced, as they come.", ("replica",))
        self._tokens_of = _TokenTimes()
        self._replicas: dict[str, _OfReplica] = {}
        self._outcomes: dict[str, Counter] = {}
        self._state = StateCollector()
        self._registry.register(self._state)

    def on_request_end(self, record: RequestRecord) -> None:
        usage = record.usage
        outcome = record.error_code or "ok"
        (self._outcomes.get(outcome) or self._outcome(outcome)).inc()
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._output_tokens.inc(usage.completion_tokens)
        if usage.cached_tokens:
            self._hit_tokens.inc(usage.cached_tokens)
        if record.num_attempts > 1:
            self._recoveries.inc(record.num_attempts - 1)
        self._duration.observe(usage.total_ms / 1000)
        if record.has_first_token:
            self._queue_wait.observe(usage.queue_ms / 1000)
            self._ttft.observe(usage.ttft_ms / 1000)
            per_choice = usage.completion_tokens / max(1, len(record.finish_reasons))
            if per_choice > 1:
                self._tpot.observe((usage.total_ms - usage.ttft_ms) / 1000 / (per_choice - 1))

    def on_refused(self, error_code: str) -> None:
        self._outcome(error_code).inc()

    def on_step(self, replica: str, step: StepOutput) -> None:
        timings = step.timings
        of_replica = self._replicas.get(replica) or self._of_replica(replica)
        of_replica.generated.inc(sum(len(output.token_ids) for output in step.sequences))
        for gap_s, num_tokens in self._tokens_of.gaps_s(replica, step, now=time.monotonic()):
            self._inter_token.add(gap_s, num_tokens)
        if step.num_batched_tokens:
            of_replica.steps.observe(timings.total_ms / 1000)
            of_replica.batched.inc(step.num_batched_tokens)
            for part, counter in of_replica.parts.items():
                counter.inc(getattr(timings, f"{part}_ms") / 1000)

    def render(self, state: ClusterState) -> tuple[bytes, str]:
        """The exposition text and its media type."""
        self._state.state = state
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _outcome(self, outcome: str) -> Counter:
        counter = self._outcomes[outcome] = self._requests.labels(outcome)
        return counter

    def _of_replica(self, replica: str) -> _OfReplica:
        """Finding a metric by its labels takes longer than adding to it."""
        of_replica = self._replicas[replica] = _OfReplica(
            generated=self._generated.labels(replica),
            steps=self._steps.labels(replica),
            batched=self._batched.labels(replica),
            parts={part: self._step_parts.labels(replica, part) for part in STEP_PARTS},
        )
        return of_replica

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"pilotfish_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(f"pilotfish_{name}", text, labels, buckets=buckets, registry=self._registry)


@dataclass(frozen=True, kw_only=True, slots=True)
class _OfReplica:
    generated: Counter
    steps: Histogram
    batched: Counter
    parts: Mapping[str, Counter]


class TokenGaps(Collector):
    """A histogram of times between tokens. There is an entry for every token: the package's own takes ten times as long."""

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self._bounds_s = bounds_s
        self._counts = [0] * (len(bounds_s) + 1)
        self._sum_s = 0.0

    def add(self, gap_s: float, num_tokens: int) -> None:
        self._counts[bisect_left(self._bounds_s, gap_s)] += num_tokens
        self._sum_s += gap_s * num_tokens

    def collect(self) -> Iterator[Metric]:
        name, text = "pilotfish_inter_token_seconds", "Between a sequence's tokens as they come to the controller."
        names = [*map(floatToGoString, self._bounds_s), "+Inf"]
        yield HistogramMetricFamily(
            name, text, buckets=list(zip(names, accumulate(self._counts), strict=True)), sum_value=self._sum_s
        )


class _TokenTimes:
    """When each running sequence last got tokens. A worker that was started again has new sequences, and steps from 1 on."""

    def __init__(self) -> None:
        self._times: dict[str, dict[str, float]] = {}
        self._last_step_ids: dict[str, int] = {}

    def gaps_s(self, replica: str, step: StepOutput, *, now: float) -> list[tuple[float, int]]:
        """Seconds a token since each sequence's last, and how many tokens; none for a first one."""
        if step.step_id and step.step_id <= self._last_step_ids.get(replica, 0):
            self._times.pop(replica, None)
        if step.step_id:
            self._last_step_ids[replica] = step.step_id
        times = self._times.setdefault(replica, {})
        gaps: list[tuple[float, int]] = []
        for output in step.sequences:
            num_tokens = len(output.token_ids)
            before = times.get(output.request_id)
            if num_tokens and before is not None:
                gaps.append(((now - before) / num_tokens, num_tokens))
            if output.finish_reason is not None:
                times.pop(output.request_id, None)
            elif num_tokens or before is None:
                times[output.request_id] = now
        return gaps
