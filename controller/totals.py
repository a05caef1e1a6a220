"""Tokens counted since the controller started: what rates are made of, in `status --watch` and on the dashboard page."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from ..common.cluster_state import ClusterState
from ..common.requests import StepOutput
from .events import Observer, RequestRecord


class Totals(Observer):
    """An Observer. `add_to` fills in a state's counts."""

    def __init__(self) -> None:
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._generated: Counter[str] = Counter()

    def on_request_end(self, record: RequestRecord) -> None:
        self._num_prompt_tokens += record.usage.prompt_tokens
        self._num_cached_tokens += record.usage.cached_tokens

    def on_step(self, replica: str, step: StepOutput) -> None:
        self._generated[replica] += sum(len(output.token_ids) for output in step.sequences)

    def add_to(self, state: ClusterState) -> ClusterState:
        return replace(
            state,
            replicas=tuple(replace(place, num_generated_tokens=self._generated[place.name]) for place in state.replicas),
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=self._num_cached_tokens,
            num_generated_tokens=self._generated.total(),
        )
