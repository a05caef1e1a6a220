"""A replica of several ranks, for tests: an engine here that leads, each follower in a process of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any

from pilotfish.common.config import EngineConfig, ModelConfig
from pilotfish.common.rank_place import RankPlace
from pilotfish.common.requests import StepOutput
from processes import preloaded_processes

ENGINE = EngineConfig(device="cpu", num_kv_blocks=64, num_threads=1)
_START_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 60.0


class Collected:
    """What an engine tells, by request.

    Attributes:
        steps: all of its messages.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.steps: list[StepOutput] = []
        self._num_ended = 0
        self._changed = threading.Condition()

    def __call__(self, step: StepOutput) -> None:
        with self._changed:
            self.steps.append(step)
            for sequence in step.sequences:
                self.tokens.setdefault(sequence.request_id, []).extend(sequence.token_ids)
                self._num_ended += sequence.finish_reason is not None
            self._changed.notify_all()

    def wait_for_ends(self, num_requests: int) -> None:
        self.wait_for(lambda: self._num_ended == num_requests, f"{num_requests} ends")

    def wait_for_tokens(self, num_tokens: int) -> None:
        self.wait_for(lambda: sum(map(len, self.tokens.values())) >= num_tokens, f"{num_tokens} tokens")

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, _END_TIMEOUT_S), f"{what} did not come: {self.tokens}"


class Followers:
    """The ranks from 1 on, as processes that are ended with the block."""

    def __init__(self, path: Path, places: list[RankPlace]) -> None:
        context = preloaded_processes()
        self.processes: list[ForkServerProcess] = []
        self._ends: list[Connection] = []
        for place in places:
            ours, theirs = context.Pipe()
            self.processes.append(context.Process(target=_follow, args=(str(path), place, theirs), daemon=True))
            self._ends.append(ours)

    def __enter__(self) -> Followers:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self.processes:
            process.kill()
            process.join(_START_TIMEOUT_S)

    def said(self, rank: int) -> str:
        """What a follower says next: "ready", why it cannot start, or why it ended."""
        end = self._ends[rank - 1]
        assert end.poll(_START_TIMEOUT_S), f"rank {rank} says nothing"
        return str(end.recv())


def places(size: int, address: str, *, timeout_s: float = 30.0, **options: Any) -> list[RankPlace]:
    """Of all ranks; `options` are further fields."""
    shared = {"size": size, "epoch": 7, "address": address, "host": "127.0.0.1", "timeout_s": timeout_s, **options}
    return [RankPlace(rank=rank, **shared) for rank in range(size)]


@contextmanager
def replica(path: Path, size: int, **options: Any) -> Iterator[tuple[Any, Collected, Followers]]:
    """An Engine that leads `size - 1` followers, and what it says; `options` as for `places`."""
    from pilotfish.workers.comm import Rendezvous
    from pilotfish.workers.engine import Engine
    from pilotfish.workers.ranks import lead

    rendezvous = Rendezvous(host="127.0.0.1", timeout_s=30)
    leader, *others = places(size, rendezvous.address, **options)
    collected = Collected()
    engine = Engine(ModelConfig(model=str(path)), ENGINE, on_step=collected, set_up=partial(lead, place=leader))
    with Followers(path, others) as followers:
        try:
            engine.start()
            assert [followers.said(place.rank) for place in others] == ["ready"] * len(others)
            yield engine, collected, followers
        finally:
            engine.stop()


def _follow(path: str, place: RankPlace, end: Connection) -> None:
    from pilotfish.common.errors import PilotfishError
    from pilotfish.workers.ranks import Follower

    ended = threading.Event()

    def tell(reason: str) -> None:
        end.send(reason)
        ended.set()

    try:
        Follower(ModelConfig(model=path), ENGINE, place, on_end=tell).start()
    except PilotfishError as error:
        end.send(error.message)
        return
    end.send("ready")
    ended.wait(300)
