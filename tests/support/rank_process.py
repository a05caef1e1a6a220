"""A follower in a process of its own, for tests of a replica's ranks."""

from __future__ import annotations

import threading
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType

from pilotfish.common.config import EngineConfig, ModelConfig
from pilotfish.common.rank_place import RankPlace

ENGINE = EngineConfig(device="cpu", num_kv_blocks=64, num_threads=1)
_START_TIMEOUT_S = 60.0


class Followers:
    """The ranks from 1 on, as processes that are ended with the block."""

    def __init__(self, path: Path, places: list[RankPlace]) -> None:
        context = get_context("spawn")
        self.processes: list[SpawnProcess] = []
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
