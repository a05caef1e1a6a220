"""Several ranks compute one replica: the leader plans and ships each plan, the others follow.

The leader's StepLoop launches through a LeadingRunner: a plan goes to the followers before the leader's own work is queued, so
that all ranks queue the same collectives in the same order. A follower decides nothing: it launches each plan as it comes, and
the leader's drawn tokens reach it by a collective (sampler.py). A replica of several data ranks has a leader of each, which
leads its tensor ranks, and before each step the leaders agree on it (step_agreement.py). An error on any rank ends the whole
replica: that rank's process ends, the others' collectives fail, and the fleet starts the replica again under a new epoch.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace

from ..common.config import EngineConfig, ModelConfig
from ..common.errors import InternalError, PilotfishError
from ..common.rank_place import LEADER, RankPlace
from ..common.requests import ExpertBalance, WorkerInfo
from ..scheduler.step_plan import StepPlan
from .comm import RankGroup
from .expert_director import ExpertDirector
from .model_runner import ModelRunner, PendingStep
from .plan_channel import ChannelClosed
from .plan_codec import PlanDecoder, encode_plan
from .plan_routes import PlanReceiver, PlanSender, open_receiver
from .rank_watch import Beat, RankWatch
from .runner_setup import choose_device, set_up_runner
from .step_agreement import StepAgreement

logger = logging.getLogger(__name__)

_IDLE_WAIT_S = 1.0
_MAX_IN_FLIGHT = 2  # steps that a follower has launched and whose end it has not seen


class LeadingRunner:
    """A ModelRunner at the head of others. `close` ends the followers; `failure` says which rank is stuck, "" while none is."""

    def __init__(self, runner: ModelRunner, group: RankGroup) -> None:
        """Waits until every follower can read plans."""
        self._runner = runner
        self._place = group.place
        self._sender = PlanSender(group)
        self._beat = Beat(group.place) if group.place.data_size > 1 else None  # for the other leaders
        # A collective that waits for a rank which is stuck ends with the group, on a GPU too.
        self._watch = RankWatch(group.place, on_failure=group.abort)
        self._director: ExpertDirector | None = None
        if runner.experts is not None and group.place.number == LEADER:
            self._director = ExpertDirector(runner.experts, group.place)
        self.agreement = StepAgreement(group.steps, self._director) if group.steps is not None else None

    @property
    def failure(self) -> str:
        return self._watch.failure

    @property
    def expert_balance(self) -> ExpertBalance | None:
        return self._director.balance if self._director is not None else None

    def launch(self, plan: StepPlan) -> PendingStep:
        if self._director is not None and self.agreement is None:
            plan = replace(plan, experts=self._director.next_orders())
        if self._place.size > 1:
            self._sender.send(encode_plan(plan, epoch=self._place.epoch), self._place.timeout_s)
        if self._beat is not None:
            self._beat.say(plan.step_id, "step")
        step = self._runner.launch(plan)
        if self._director is not None:
            self._director.launched(step)
        return step

    def close(self) -> None:
        if self._beat is not None:
            self._beat.close()
        self._watch.close()
        self._sender.close()
        self._runner.close()


def lead(
    model_config: ModelConfig,
    engine_config: EngineConfig,
    *,
    place: RankPlace,
    on_join: Callable[[RankGroup], None] | None = None,
) -> tuple[LeadingRunner, WorkerInfo]:
    """Sets the leader up together with its followers; an Engine's `set_up`.

    `on_join` gets the group when all ranks are there, before a model is loaded.

    Raises:
        PilotfishError: this rank cannot start, or another did not come in time.
    """
    group = RankGroup.join(place, choose_device(engine_config, place))
    if on_join is not None:
        on_join(group)
    runner, info = set_up_runner(model_config, engine_config, group=group)
    return LeadingRunner(runner, group), info


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
            group = RankGroup.join(place, choose_device(self._engine_config, place))
            runner, _ = set_up_runner(self._model_config, self._engine_config, group=group)
            plans, beat = open_receiver(group), Beat(place)
        except PilotfishError as error:
            self._started.set_exception(error)
            return
        except Exception as error:
            logger.exception("rank %d cannot start", place.number)
            self._started.set_exception(InternalError(f"{type(error).__name__}: {error}"))
            return
        self._started.set_result(None)
        try:
            reason = _follow(runner, plans, beat, epoch=place.epoch)
        except Exception as error:
            logger.exception("rank %d failed", place.number)
            reason = f"rank {place.number} failed: {type(error).__name__}: {error}"
        beat.close()
        self._on_end(reason)


def _follow(runner: ModelRunner, plans: PlanReceiver, beat: Beat, *, epoch: int) -> str:
    """Until the leader ends; returns what it said."""
    decoder, in_flight = PlanDecoder(epoch=epoch), deque[PendingStep]()
    while True:
        try:
            message = plans.receive(_IDLE_WAIT_S)
        except ChannelClosed as end:
            return str(end)
        if message is None:
            continue
        plan = decoder.decode(message)
        beat.say(plan.step_id, "step")
        in_flight.append(runner.launch(plan))
        if len(in_flight) == _MAX_IN_FLIGHT:
            in_flight.popleft().result()
        beat.say(plan.step_id, "waiting")
