"""A replica of several data ranks for tests: its leaders are engines of this process, its other ranks processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pilotfish.common.config import EngineConfig, ModelConfig
from pilotfish.common.rank_place import RankPlace
from pilotfish.common.requests import EngineRequest, ExpertBalance, StepOutput, WorkerInfo
from pilotfish.workers.comm import Rendezvous
from pilotfish.workers.engine import Engine
from pilotfish.workers.model_runner import ModelRunner
from pilotfish.workers.ranks import LeadingRunner, lead
from rank_process import ENGINE, Followers

TIMEOUT_S = 60.0


class Told:
    """What one engine tells, by request."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.ended: set[str] = set()
        self.num_steps = 0
        self.balances: list[ExpertBalance | None] = []
        self._changed = threading.Condition()

    def __call__(self, step: StepOutput) -> None:
        with self._changed:
            self.num_steps += 1
            self.balances.append(step.load.expert_balance)
            for sequence in step.sequences:
                self.tokens.setdefault(sequence.request_id, []).extend(sequence.token_ids)
                if sequence.finish_reason is not None:
                    assert not sequence.error, sequence.error
                    self.ended.add(sequence.request_id)
            self._changed.notify_all()

    def wait(self, *, num_ended: int = 0, num_tokens: int = 0) -> None:
        """Until so many requests have ended, and so many tokens have come."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: len(self.ended) >= num_ended and sum(map(len, self.tokens.values())) >= num_tokens, TIMEOUT_S
            ), f"{self.ended} of {num_ended} have ended, with {self.tokens}"


def places(tensor_size: int, data_size: int, rendezvous: Rendezvous, *, timeout_s: float, **options: Any) -> list[RankPlace]:
    """In the order of their numbers; `options` are further fields."""
    return [
        RankPlace(
            rank=number % tensor_size,
            size=tensor_size,
            data_rank=number // tensor_size,
            data_size=data_size,
            epoch=5,
            address=rendezvous.address,
            host="127.0.0.1",
            timeout_s=timeout_s,
            whole_experts=True,
            **options,
        )
        for number in range(tensor_size * data_size)
    ]


@contextmanager
def data_replica(
    path: Path,
    *,
    data_size: int,
    tensor_size: int = 1,
    max_steps_in_flight: int = 1,
    timeout_s: float = 30.0,
    prepare: Callable[[ModelRunner], object] = lambda runner: None,
    **options: Any,
) -> Iterator[tuple[list[Engine], list[Told]]]:
    """(the leaders' engines, started; what they tell), by data rank. `prepare` is called on each leader's thread."""
    rendezvous = Rendezvous(host="127.0.0.1", timeout_s=timeout_s)
    ranks = places(tensor_size, data_size, rendezvous, timeout_s=timeout_s, **options)
    told = [Told() for _ in range(data_size)]
    engines = [
        Engine(
            ModelConfig(model=str(path)),
            ENGINE,
            on_step=told[place.data_rank],
            set_up=partial(_lead_prepared, place=place, prepare=prepare),
            max_steps_in_flight=max_steps_in_flight,
        )
        for place in ranks
        if place.is_leader
    ]
    with Followers(path, [place for place in ranks if not place.is_leader]), ThreadPoolExecutor(data_size) as starters:
        try:
            list(starters.map(lambda engine: engine.start(), engines))
            yield engines, told
        finally:
            list(starters.map(lambda engine: engine.stop(), engines))


def _lead_prepared(
    model_config: ModelConfig, engine_config: EngineConfig, *, place: RankPlace, prepare: Callable[[ModelRunner], object]
) -> tuple[LeadingRunner, WorkerInfo]:
    runner, info = lead(model_config, engine_config, place=place)
    prepare(runner._runner)
    return runner, info


def run_alone(path: Path, requests: Sequence[EngineRequest]) -> dict[str, list[int]]:
    """The tokens of one engine, by request."""
    told = Told()
    engine = Engine(ModelConfig(model=str(path)), ENGINE, on_step=told)
    engine.start()
    try:
        for request in requests:
            engine.submit(request)
        told.wait(num_ended=len(requests))
    finally:
        engine.stop()
    return told.tokens
