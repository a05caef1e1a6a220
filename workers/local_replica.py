"""A replica whose ranks are processes of this machine, without Ray: an engine here leads, the processes started here follow.

A LocalReplica is an Engine's `set_up`, and the runner that it sets up. Life cycle: on the engine's thread it starts a process
a follower (rank r on GPU r, or all on the CPU), leads them (ranks.py), and ends them when the engine ends, when it cannot
start, or when this process ends in whatever way. A follower that ends first ends the engine, with the follower's reason.

Processes are spawned: a script that makes one needs `if __name__ == "__main__":`, as multiprocessing says.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import torch

from ..common import logs
from ..common.config import EngineConfig, ModelConfig, ParallelConfig
from ..common.errors import ConfigError, InternalError, PilotfishError
from ..common.rank_place import LEADER, RankPlace
from ..common.requests import ExpertBalance, WorkerInfo
from ..scheduler.step_plan import StepPlan
from .comm import RankGroup, Rendezvous
from .cpu_threads import share_of_machine
from .model_runner import PendingStep
from .ranks import Follower, LeadingRunner, lead
from .runner_setup import choose_device

_HOST = "127.0.0.1"
_PROCESS_START_S = 120.0
_PROCESS_END_S = 10.0
_LAST_WORDS_S = 2.0
_WATCH_INTERVAL_S = 0.2
_HERE = "here"


class LocalReplica:
    """See the module. One for each Engine."""

    agreement = None  # one data rank

    def __init__(self, parallel: ParallelConfig) -> None:
        self._parallel = parallel
        self._failure = ""
        self._is_closing = False
        self._followers: list[_FollowerProcess] = []
        self._rendezvous: Rendezvous | None = None  # held open
        self._group: RankGroup | None = None
        self._runner: LeadingRunner | None = None

    def __call__(self, model_config: ModelConfig, engine_config: EngineConfig) -> tuple[LocalReplica, WorkerInfo]:
        """Starts all ranks.

        Raises:
            ConfigError: this machine has too few GPUs.
            PilotfishError: a rank cannot start, and why.
        """
        size = self._parallel.tensor_parallel
        if choose_device(engine_config).type == "cpu":
            engine_config = share_of_machine(engine_config, size)
        elif torch.cuda.device_count() < size:
            raise ConfigError(
                f"tensor_parallel {size} needs {size} GPUs; this machine has {torch.cuda.device_count()}: "
                "lower it, or use device cpu"
            )
        leader, *others = self._places()
        try:
            self._followers = [_FollowerProcess.start(model_config, engine_config, place) for place in others]
            for follower in self._followers:
                follower.wait_until_here()
            threading.Thread(target=self._watch, name="follower-watch", daemon=True).start()
            self._runner, info = lead(model_config, engine_config, place=leader, on_join=self._join)
        except BaseException as error:
            reason = self._failure or self._last_words()  # the cause comes before the leader's complaint about it
            self.close()
            if reason and isinstance(error, Exception):
                raise InternalError(reason) from error
            raise
        return self, info

    @property
    def failure(self) -> str:
        return self._failure or (self._runner.failure if self._runner is not None else "")

    @property
    def expert_balance(self) -> ExpertBalance | None:
        return self._runner.expert_balance if self._runner is not None else None

    def launch(self, plan: StepPlan) -> PendingStep:
        assert self._runner is not None
        return self._runner.launch(plan)

    def close(self) -> None:
        """Ends the followers. May be called again."""
        self._is_closing = True
        if self._runner is not None:
            self._runner.close()
        deadline_s = time.monotonic() + (_PROCESS_END_S if self._runner is not None and not self._failure else 0)
        for follower in self._followers:
            follower.end(max(0.0, deadline_s - time.monotonic()))

    def _join(self, group: RankGroup) -> None:
        self._group = group

    def _places(self) -> list[RankPlace]:
        size, timeout_s = self._parallel.tensor_parallel, self._parallel.collective_timeout_s
        self._rendezvous = Rendezvous(host=_HOST, timeout_s=timeout_s)
        return [
            RankPlace(
                rank=rank,
                size=size,
                epoch=0,
                address=self._rendezvous.address,
                host=_HOST,
                timeout_s=timeout_s,
                whole_experts=self._parallel.expert_parallel,
                num_redundant_experts=self._parallel.redundant_experts,
                rebalance_interval_steps=self._parallel.rebalance_interval_steps,
                gpu=rank,
            )
            for rank in range(size)
        ]

    def _watch(self) -> None:
        """Until a follower has ended or is stuck: then no other can go on."""
        sentinels = [follower.process.sentinel for follower in self._followers]
        while not connection.wait(sentinels, _WATCH_INTERVAL_S) and not self.failure:
            pass
        if self._is_closing:
            return
        self._failure = self.failure or self._last_words()
        for follower in self._followers:
            follower.end(0)
        if self._group is not None:
            self._group.abort()

    def _last_words(self) -> str:
        """Why the first of the followers that have ended did; "" while all run."""
        ended = [follower for follower in self._followers if connection.wait([follower.process.sentinel], 0)]
        return ended[0].last_words() if ended else ""


@dataclass(frozen=True, slots=True)
class _FollowerProcess:
    """A rank that is not the leader. It says _HERE when it joins the others and why it ends; it ends when `words` breaks."""

    place: RankPlace
    process: SpawnProcess
    words: Connection

    @classmethod
    def start(cls, model_config: ModelConfig, engine_config: EngineConfig, place: RankPlace) -> _FollowerProcess:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (model_config, engine_config, place, theirs)
        process = context.Process(target=_follow, args=arguments, name=f"pilotfish-rank-{place.rank}", daemon=True)
        process.start()
        theirs.close()  # so that ours ends with the process
        return cls(place, process, ours)

    def wait_until_here(self) -> None:
        """Raises InternalError: it ended, or has not come in time."""
        try:
            if self.words.poll(_PROCESS_START_S) and self.words.recv() == _HERE:
                return
        except EOFError:
            pass
        raise InternalError(f"rank {self.place.rank} did not start within {_PROCESS_START_S:g} s, see what it says above")

    def last_words(self) -> str:
        """Of an ended process."""
        self.process.join(_LAST_WORDS_S)
        with contextlib.suppress(EOFError, OSError):
            if self.words.poll():
                return str(self.words.recv())
        return f"rank {self.place.rank}'s process ended (exit code {self.process.exitcode})"

    def end(self, timeout_s: float) -> None:
        self.process.join(timeout_s)
        self.process.kill()
        self.process.join(_PROCESS_END_S)


def _follow(model_config: ModelConfig, engine_config: EngineConfig, place: RankPlace, words: Connection) -> None:
    """The whole life of a follower's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the leader too, which ends this process
    logs.set_up(f"rank-{place.rank}", level=os.environ.get("PILOTFISH_LOG_LEVEL") or "WARNING")
    assert place.rank != LEADER
    words.send(_HERE)

    def end(reason: str) -> None:
        with contextlib.suppress(OSError):  # the leader may be gone
            words.send(reason)
        logging.shutdown()
        os._exit(0)  # without waiting for a device that may be stuck

    try:
        Follower(model_config, engine_config, place, on_end=end).start()
    except PilotfishError as error:
        end(f"rank {place.rank} cannot start: {error.message}")
    with contextlib.suppress(EOFError, OSError):
        words.recv()  # nothing is ever sent: it breaks when the leader's process ends
    end("the leader's process has ended")
