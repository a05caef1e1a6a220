"""Several ranks compute one replica: the leader plans and ships each plan, the others follow.

The leader's StepLoop launches through a LeadingRunner: a plan goes to the followers before the leader's own work is queued, so that
all ranks queue the same collectives in the same order. A follower decides nothing: it launches each plan as it comes, and the
leader's drawn tokens reach it by a collective (sampler.py). An error on any rank ends the whole replica: that rank's process
ends, the others' collectives fail, and the fleet starts the replica again under a new epoch.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from ..common.config import EngineConfig, ModelConfig
from ..common.errors import PilotfishError
from ..common.rank_place import RankPlace
from ..common.requests import WorkerInfo
from ..scheduler.step_plan import StepPlan
from .comm import RankGroup
from .model_runner import ModelRunner, PendingStep
from .runner_setup import choose_device, set_up_runner

logger = logging.getLogger(__name__)


class LeadingRunner:
    """A ModelRunner at the head of others."""

    def __init__(self, runner: ModelRunner, ship: Callable[[StepPlan], None]) -> None:
        self._runner = runner
        self._ship = ship

    def launch(self, plan: StepPlan) -> PendingStep:
        self._ship(plan)
        return self._runner.launch(plan)


class Follower:
    """A rank that is not the leader: sets itself up with the others, then follows on a thread until the replica ends.

    `on_end` is called on that thread with the reason.
    """

    def __init__(
        self, model_config: ModelConfig, engine_config: EngineConfig, place: RankPlace, *, on_end: Callable[[str], None]
    ) -> None:
        self._model_config, self._engine_config, self._place, self._on_end = model_config, engine_config, place, on_end
        self._thread = threading.Thread(target=self._run, name="pilotfish-follower", daemon=True)
        self._started: Future[None] = Future()

    def start(self) -> None:
        """Returns when plans can come. Raises PilotfishError: why it cannot start."""
        self._thread.start()
        self._started.result()

    def _run(self) -> None:
        place = self._place
        try:
            device = choose_device(self._engine_config)
            group = RankGroup.join(place, device)
            runner, _ = set_up_runner(self._model_config, self._engine_config, group=group)
            plans = open_reader(group)
        except Exception as error:
            if not isinstance(error, PilotfishError):
                logger.exception("rank %d cannot start", place.rank)
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        try:
            reason = follow(runner, plans)
        except Exception as error:
            logger.exception("rank %d failed", place.rank)
            reason = f"rank {place.rank} failed: {type(error).__name__}: {error}"
        self._on_end(reason)
