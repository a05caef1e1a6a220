"""What the processes of a chaos test run: a worker, which chaos_host.py starts, or a controller, whose launcher asks that."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pilotfish.common import logs
from pilotfish.common.config import EngineConfig, FleetConfig, GatewayConfig, ModelConfig, ServeConfig
from pilotfish.common.errors import PilotfishError
from pilotfish.common.identity import Identity
from pilotfish.common.requests import ServingWorker, WorkerInfo
from pilotfish.controller import grpc_wakeups
from pilotfish.controller.authority import Authority
from pilotfish.controller.controller import Controller
from pilotfish.controller.worker_process import WorkerDied, worker_name
from pilotfish.scheduler.step_plan import StepPlan
from pilotfish.workers.engine import Engine, Phase
from pilotfish.workers.server import WorkerServer
from pilotfish.workers.timed_runner import TimedReplica, TimedRunner, TimedStep, TimingModel
from pilotfish.workers.worker_service import ServerLimits

_HEARTBEAT_INTERVAL_S = 0.1
_VOCAB_SIZE = 257


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of a cluster: `timing` None runs the model at `model_path`, else only its tokenizer is used. A worker that is given
    `poison` (with a timing) dies of the second step of a sequence whose prompt begins with that token."""

    model_path: str
    engine: EngineConfig
    fleet: FleetConfig
    timing: TimingModel | None = None
    poison: int | None = None
    gateway: GatewayConfig = field(default_factory=lambda: GatewayConfig(grpc_port=0, http_port=0))

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(model=self.model_path, served_name="chaos")


class PoisonedRunner(TimedRunner):
    """Dies as a process whose GPU kernel faults: at once, saying nothing."""

    def __init__(self, timing: TimingModel, poison: int) -> None:
        super().__init__(timing)
        self._poison = poison
        self._deadly_slots: set[int] = set()

    def launch(self, plan: StepPlan) -> TimedStep:
        if any(row.slot in self._deadly_slots for row in plan.rows):
            os.kill(os.getpid(), signal.SIGKILL)
        self._deadly_slots -= set(plan.released_slots)
        self._deadly_slots |= {entry.slot for entry in plan.admitted if entry.request.prompt_token_ids[0] == self._poison}
        return super().launch(plan)


@dataclass(frozen=True)
class ChaosReplica:
    """An Engine's `set_up` without a model, which takes all tokens of the tests' tokenizer."""

    timing: TimingModel
    poison: int | None

    def __call__(self, model_config: ModelConfig, engine_config: EngineConfig) -> tuple[TimedRunner, WorkerInfo]:
        runner, info = TimedReplica(timing=self.timing)(model_config, engine_config)
        if self.poison is not None:
            runner = PoisonedRunner(self.timing, self.poison)
        return runner, replace(info, vocab_size=_VOCAB_SIZE)


def run_worker(settings: Settings, host: str, number: int, identity: Identity, epoch: int) -> None:
    """Serves until it is killed, or until its engine has failed."""
    logs.set_up(f"worker {number}")
    set_up: Any = None
    if settings.timing is not None:
        set_up = ChaosReplica(settings.timing, settings.poison)
    server = WorkerServer(ServerLimits(heartbeat_interval_s=_HEARTBEAT_INTERVAL_S), identity)
    engine = Engine(settings.model, settings.engine, on_step=server.on_step, set_up=set_up)
    info = replace(engine.start(), epoch=epoch, pid=os.getpid())
    address = server.start(engine, info, host="127.0.0.1")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(host)
        connection.sendall(framed(("serving", number, ServingWorker(address=address, node="here", info=info))))
        connection.recv(1)  # who hangs up before the answer does not want it
    while engine.health().phase is not Phase.FAILED:
        time.sleep(0.2)
    raise SystemExit(f"the engine failed: {engine.health()}")


def run_controller(settings: Settings, host: str, number: int, authority: Authority, journal_path: Path) -> None:
    """Serves until it is killed."""
    logs.set_up(f"controller {number}")
    asyncio.run(_control(settings, host, number, authority, journal_path))


async def _control(settings: Settings, host: str, number: int, authority: Authority, journal_path: Path) -> None:
    grpc_wakeups.take_all_at_once(asyncio.get_running_loop())
    config = ServeConfig(
        model=settings.model,
        engine=settings.engine,
        gateway=settings.gateway,
        fleet=settings.fleet,
    )
    controller = Controller(
        config,
        model_path=settings.model_path,
        launcher=HostLauncher(host, authority),
        authority=authority,
        controller_id=f"controller-{number}",
        journal_path=journal_path,
    )
    await ask(host, "open", number, await controller.start(is_restart=number > 0))
    await asyncio.Event().wait()


@dataclass
class HostWorker:
    """A WorkerProcess of the controller's fleet."""

    host: str
    number: int
    places: Sequence[ServingWorker]

    async def wait_dead(self) -> str:
        return await ask(self.host, "wait_dead", self.number)

    async def has_lost_machine(self) -> bool:
        return False

    async def wait_notice(self) -> float:
        await asyncio.Event().wait()  # nobody takes this machine away
        raise AssertionError("nothing ends this wait")

    async def end(self) -> None:
        await ask(self.host, "end", self.number)


@dataclass
class HostLauncher:
    """The fleet's Launcher."""

    host: str
    authority: Authority

    async def launch(self, replica: str, *, epoch: int, **_: Any) -> HostWorker:
        identity = self.authority.issue(worker_name(replica, epoch=epoch))
        return HostWorker(self.host, *await ask(self.host, "launch", replica, identity, epoch))

    async def find(self) -> Mapping[str, HostWorker]:
        return {name: HostWorker(self.host, *found) for name, found in (await ask(self.host, "find")).items()}


async def ask(host: str, *message: Any) -> Any:
    """One call to the host, over a connection of its own; raises what it answers with, if that is an error."""
    reader, writer = await asyncio.open_unix_connection(host)
    try:
        writer.write(framed(message))
        result = await receive(reader)
    finally:
        writer.close()
    if isinstance(result, PilotfishError | WorkerDied):
        raise result
    return result


async def receive(reader: asyncio.StreamReader) -> Any:
    size = int.from_bytes(await reader.readexactly(4))
    return pickle.loads(await reader.readexactly(size))


def framed(message: object) -> bytes:
    data = pickle.dumps(message)
    return len(data).to_bytes(4) + data
