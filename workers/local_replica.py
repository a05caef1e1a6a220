"""A replica whose ranks are processes of this machine, without Ray: an engine here leads, the processes started here follow.

A LocalReplica is an Engine's `set_up`, and the runner that it sets up. Life cycle: on the engine's thread it starts a process
for each other rank (rank r on GPU r, or all on the CPU), leads those of its data rank (ranks.py), and ends all when the engine
ends, when it cannot start, or when this process ends in whatever way. A rank that ends first ends the engine, with its reason.
Where there are several data ranks, the engines that lead the others take requests through `leaders`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import connection

import torch

from ..common.config import EngineConfig, ModelConfig, ParallelConfig
from ..common.errors import ConfigError, InternalError, PilotfishError
from ..common.rank_place import RankPlace
from ..common.requests import ExpertBalance, StepOutput, WorkerInfo
from ..scheduler.step_plan import StepPlan
from .comm import RankGroup, Rendezvous
from .cpu_threads import share_of_machine
from .local_rank import LAST_WORDS_S, LocalLeader, RankProcess
from .model_runner import PendingStep
from .ranks import LeadingRunner, lead
from .runner_setup import choose_device
from .step_agreement import StepAgreement

_HOST = "127.0.0.1"
_PROCESS_END_S = 10.0
_WATCH_INTERVAL_S = 0.2


class LocalReplica:
    """See the module. One for each Engine.

    Args:
        on_step: of the engines that lead other data ranks, where there are any; (data rank, step), on a thread for each.

    Attributes:
        leaders: of data ranks 1 and on, once the engine has started.
    """

    def __init__(self, parallel: ParallelConfig, *, on_step: Callable[[int, StepOutput], None] | None = None) -> None:
        self.leaders: list[LocalLeader] = []
        self._on_step = on_step
        self._parallel = parallel
        self._failure = ""
        self._is_closing = False
        self._others: list[RankProcess] = []
        self._watcher = threading.Thread(target=self._watch, name="rank-process-watch", daemon=True)
        self._rendezvous: Rendezvous | None = None  # held open
        self._group: RankGroup | None = None
        self._runner: LeadingRunner | None = None

    def __call__(self, model_config: ModelConfig, engine_config: EngineConfig) -> tuple[LocalReplica, WorkerInfo]:
        """Starts all ranks.

        Raises:
            ConfigError: this machine has too few GPUs.
            PilotfishError: a rank cannot start, and why.
        """
        size = self._parallel.num_ranks
        if choose_device(engine_config).type == "cpu":
            engine_config = share_of_machine(engine_config, size)
        elif torch.cuda.device_count() < size:
            raise ConfigError(
                f"tensor_parallel {self._parallel.tensor_parallel} x data_parallel {self._parallel.data_parallel} needs {size} "
                f"GPUs; this machine has {torch.cuda.device_count()}: lower one, or use device cpu"
            )
        leader, *others = self._places()
        try:
            self._others = [RankProcess.start(model_config, engine_config, place) for place in others]
            for rank in self._others:
                rank.wait_until_here()
            self._watcher.start()
            self._runner, info = lead(model_config, engine_config, place=leader, on_join=self._join)
        except BaseException as error:
            # What another rank says is the cause of the leader's complaint, unless that is about the model or the settings.
            is_own = not isinstance(error, Exception) or (
                isinstance(error, PilotfishError) and not isinstance(error, InternalError)
            )
            reason = "" if is_own else self._wait_for_failure()
            self.close()
            if reason:
                raise InternalError(reason) from error
            raise
        for rank in self._others:
            if rank.place.is_leader:
                assert self._on_step is not None
                self.leaders.append(LocalLeader(rank, partial(self._on_step, rank.place.data_rank)))
        return self, info

    @property
    def agreement(self) -> StepAgreement | None:
        assert self._runner is not None
        return self._runner.agreement

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
        """Ends the other ranks. May be called again."""
        self._is_closing = True
        if self._runner is not None:
            self._runner.close()
        deadline_s = time.monotonic() + (_PROCESS_END_S if self._runner is not None and not self._failure else 0)
        for rank in self._others:
            rank.end(max(0.0, deadline_s - time.monotonic()))
        if self._group is not None and self._runner is not None:  # closed, so no graph holds the group
            self._group.close()

    def _join(self, group: RankGroup) -> None:
        self._group = group

    def _places(self) -> list[RankPlace]:
        size, timeout_s = self._parallel.tensor_parallel, self._parallel.collective_timeout_s
        self._rendezvous = Rendezvous(host=_HOST, timeout_s=timeout_s)
        return [
            RankPlace(
                rank=number % size,
                size=size,
                data_rank=number // size,
                data_size=self._parallel.data_parallel,
                epoch=0,
                address=self._rendezvous.address,
                host=_HOST,
                timeout_s=timeout_s,
                whole_experts=self._parallel.expert_parallel,
                num_redundant_experts=self._parallel.redundant_experts,
                rebalance_interval_steps=self._parallel.rebalance_interval_steps,
                gpu=number,
            )
            for number in range(self._parallel.num_ranks)
        ]

    def _watch(self) -> None:
        """Until a rank has ended or is stuck: then no other can go on."""
        sentinels = [rank.process.sentinel for rank in self._others]
        while not connection.wait(sentinels, _WATCH_INTERVAL_S) and not self.failure:
            pass
        if self._is_closing:
            return
        self._failure = self.failure or self._last_words()
        for rank in self._others:
            rank.end(0)
        if self._group is not None:
            self._group.abort()

    def _wait_for_failure(self) -> str:
        """Of another rank, which the leader may notice before its process has ended; "" if there is none."""
        if self._watcher.is_alive():
            self._watcher.join(2 * LAST_WORDS_S)
        return self._failure

    def _last_words(self) -> str:
        """Why the first of the ranks that have ended did; "" while all run."""
        ended = [rank for rank in self._others if rank.has_ended]
        return ended[0].last_words() if ended else ""
