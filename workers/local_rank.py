"""One rank of a local replica (local_replica.py) as a process: this process's end of it, and that process's whole life.

A rank says that it is here, joins the others, and says why it ends; it ends when the process that started it does. One that
leads a data rank has an engine, which takes requests and tells of steps through a pipe of bytes, as messages of worker.proto.

Processes are spawned: a script that makes one needs `if __name__ == "__main__":`, as multiprocessing says.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import NoReturn

from ..common import logs
from ..common.config import EngineConfig, ModelConfig
from ..common.errors import InternalError, Overloaded, PilotfishError
from ..common.rank_place import RankPlace
from ..common.requests import EngineRequest, StepOutput
from ..proto import worker_pb2
from ..proto.codec import request_from_proto, request_to_proto, step_from_proto, step_to_proto
from .engine import MAX_LIVE_REQUESTS, Engine, Phase
from .ranks import Follower, lead

_PROCESS_START_S = 120.0
_PROCESS_END_S = 10.0
LAST_WORDS_S = 2.0
_WATCH_INTERVAL_S = 0.2
_ENDING_S = 0.001  # of a request that has been told and still counts
_HERE = "here"


@dataclass(frozen=True, slots=True)
class RankProcess:
    """This process's end. `words` breaks with the rank; `steps` is the pipe of one that leads."""

    place: RankPlace
    process: SpawnProcess
    words: Connection
    steps: Connection

    @classmethod
    def start(cls, model_config: ModelConfig, engine_config: EngineConfig, place: RankPlace) -> RankProcess:
        context = get_context("spawn")
        (words, their_words), (steps, their_steps) = context.Pipe(), context.Pipe()
        arguments = (model_config, engine_config, place, their_words, their_steps)
        process = context.Process(target=_run_rank, args=arguments, name=f"pilotfish-rank-{place.number}", daemon=True)
        process.start()
        for theirs in (their_words, their_steps):
            theirs.close()  # so that ours ends with the process
        return cls(place, process, words, steps)

    def wait_until_here(self) -> None:
        """Raises InternalError: it ended, or has not come in time."""
        try:
            if self.words.poll(_PROCESS_START_S) and self.words.recv() == _HERE:
                return
        except EOFError:
            pass
        raise InternalError(f"rank {self.place.number} did not start within {_PROCESS_START_S:g} s, see what it says above")

    @property
    def has_ended(self) -> bool:
        return bool(connection.wait([self.process.sentinel], 0))

    def last_words(self) -> str:
        """Of an ended process."""
        self.process.join(LAST_WORDS_S)
        with contextlib.suppress(EOFError, OSError):
            if self.words.poll():
                return str(self.words.recv())
        return f"rank {self.place.number}'s process ended (exit code {self.process.exitcode})"

    def end(self, timeout_s: float) -> None:
        self.process.join(timeout_s)
        self.process.kill()
        self.process.join(_PROCESS_END_S)


class LocalLeader:
    """The engine of a rank that leads, from outside. `on_step` is called on a thread of its own, until the process ends."""

    def __init__(self, rank: RankProcess, on_step: Callable[[StepOutput], None]) -> None:
        self._steps = rank.steps
        self._on_step = on_step
        self._live: set[str] = set()
        threading.Thread(target=self._read, name=f"steps-of-rank-{rank.place.number}", daemon=True).start()

    def submit(self, request: EngineRequest) -> None:
        """Raises Overloaded: it holds as many requests as it can."""
        if len(self._live) >= MAX_LIVE_REQUESTS:
            raise Overloaded(f"this engine holds {MAX_LIVE_REQUESTS} requests already", retry_after_s=1.0)
        self._live.add(request.request_id)
        self._steps.send_bytes(request_to_proto(request).SerializeToString())

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError):  # the process's end is watched elsewhere
            while True:
                step = step_from_proto(worker_pb2.Step.FromString(self._steps.recv_bytes()))
                self._live -= {sequence.request_id for sequence in step.sequences if sequence.finish_reason is not None}
                self._on_step(step)


def _run_rank(
    model_config: ModelConfig, engine_config: EngineConfig, place: RankPlace, words: Connection, steps: Connection
) -> None:
    """The whole life of a rank's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the first rank too, which ends this process
    logs.set_up("rank", rank=place.number, log_level=os.environ.get(logs.LEVEL_VARIABLE) or "WARNING")
    words.send(_HERE)

    def end(reason: str) -> NoReturn:
        with contextlib.suppress(OSError):  # the first rank may be gone
            words.send(reason)
        logging.shutdown()
        os._exit(0)  # without waiting for a device that may be stuck

    try:
        if place.is_leader:
            _take_requests(_start_engine(model_config, engine_config, place, steps, end), steps)
        else:
            Follower(model_config, engine_config, place, on_end=end).start()
            with contextlib.suppress(EOFError, OSError):
                words.recv()  # nothing is ever sent: it breaks when the first rank's process ends
    except PilotfishError as error:
        end(f"rank {place.number} cannot start: {error.message}")
    end("the first rank's process has ended")


def _start_engine(
    model_config: ModelConfig,
    engine_config: EngineConfig,
    place: RankPlace,
    steps: Connection,
    end: Callable[[str], NoReturn],
) -> Engine:
    def tell(step: StepOutput) -> None:
        steps.send_bytes(step_to_proto(step).SerializeToString())

    def watch() -> None:
        while (health := engine.health()).phase is not Phase.FAILED:
            time.sleep(_WATCH_INTERVAL_S)
        end(f"rank {place.number} failed: {health.message}")

    engine = Engine(model_config, engine_config, on_step=tell, set_up=partial(lead, place=place))
    engine.start()
    threading.Thread(target=watch, name="engine-watch", daemon=True).start()
    return engine


def _take_requests(engine: Engine, steps: Connection) -> None:
    """Until the first rank's process ends."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            request = request_from_proto(worker_pb2.Submit.FromString(steps.recv_bytes()))
            while True:
                try:
                    engine.submit(request)
                    break
                except Overloaded:  # one that has been told is about to end
                    time.sleep(_ENDING_S)
