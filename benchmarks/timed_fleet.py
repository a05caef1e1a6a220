"""A controller and replicas without a model, in processes of their own, for benchmarks of what is around the model.

One process hosts the replicas (steady_replica.py) and says when a token came into being. One runs the Controller, as under Ray
but with a launcher that asks the host; each gateway has one, if there are any. Life: `TimedFleet` starts all, its `with` block
ends them; a process whose parent is gone ends too.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from pilotfish.common import garbage
from pilotfish.common.config import EngineConfig, FleetConfig, GatewayConfig, ModelConfig, ServeConfig
from pilotfish.common.identity import Identity
from pilotfish.common.requests import ServingWorker, StepOutput
from pilotfish.controller import grpc_wakeups
from pilotfish.controller.authority import Authority
from pilotfish.controller.controller import Controller
from pilotfish.controller.gateway import Gateway
from pilotfish.controller.service import Addresses
from pilotfish.controller.worker_process import worker_name

_START_S = 120.0
_PROCESSES = multiprocessing.get_context("spawn")


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetSettings:
    """`path` has the tokenizer; sizes are those of each replica, whose steps take `step_s`."""

    path: str
    step_s: float
    num_replicas: int = 8
    max_num_seqs: int = 128
    num_kv_blocks: int = 100_000
    num_gateways: int = 0

    def engine(self) -> EngineConfig:
        return EngineConfig(device="cpu", max_num_seqs=self.max_num_seqs, num_kv_blocks=self.num_kv_blocks)


class _Emissions:
    """When tokens came out of the engines: (request id, output position) -> monotonic seconds."""

    def __init__(self) -> None:
        self.times_s: dict[tuple[str, int], float] = {}

    def note(self, step: StepOutput) -> None:
        now_s = time.monotonic()
        for output in step.sequences:
            if output.token_ids:
                self.times_s[output.request_id.partition("~")[0], output.offset] = now_s


def _host(settings: FleetSettings, calls: Connection, answers: Connection) -> None:
    """The replicas' process: starts one for each (name, identity, epoch); an empty message on `answers` asks for emissions."""
    from steady_replica import SteadyReplica, worker_info

    emissions, replicas = _Emissions(), []

    async def start(identity: Identity, epoch: int) -> None:
        info = worker_info(max_num_seqs=settings.max_num_seqs, num_blocks=settings.num_kv_blocks, epoch=epoch)
        replica = SteadyReplica(info=info, identity=identity, step_s=settings.step_s, on_step=emissions.note)
        replicas.append(replica)
        calls.send(await replica.start())
        if len(replicas) == settings.num_replicas:
            gc.disable()  # looking through all emissions would hold up steps, which replicas of their own do not

    async def serve() -> None:
        starting: set[asyncio.Task[None]] = set()

        def take_call() -> None:
            try:
                starting.add(asyncio.get_running_loop().create_task(start(*calls.recv())))
            except EOFError:
                os._exit(0)  # whoever asked is gone

        def answer() -> None:
            try:
                answers.recv()
            except EOFError:
                os._exit(0)
            answers.send(emissions.times_s)
            emissions.times_s = {}

        loop = asyncio.get_running_loop()
        loop.add_reader(calls.fileno(), take_call)
        loop.add_reader(answers.fileno(), answer)
        await asyncio.Event().wait()

    asyncio.run(serve())


@dataclass(slots=True)
class _HostedWorker:
    places: Sequence[ServingWorker]

    async def wait_dead(self) -> str:
        """Its process lives as long as the benchmark."""
        await asyncio.Event().wait()
        raise AssertionError("nothing ends this wait")

    async def has_lost_machine(self) -> bool:
        return False

    async def wait_notice(self) -> float:
        """Nobody takes the machine away."""
        await asyncio.Event().wait()
        raise AssertionError("nothing ends this wait")

    async def end(self) -> None:
        """The host ends all at once."""


class _HostLauncher:
    """The fleet's Launcher: asks the host for one replica after the other."""

    def __init__(self, calls: Connection, authority: Authority) -> None:
        self._calls = calls
        self._authority = authority
        self._lock = asyncio.Lock()

    async def launch(self, replica: str, *, epoch: int, **_: Any) -> _HostedWorker:
        async with self._lock:
            self._calls.send((self._authority.issue(worker_name(replica, epoch=epoch)), epoch))
            return _HostedWorker([await asyncio.to_thread(self._calls.recv)])

    async def find(self) -> Mapping[str, _HostedWorker]:
        return {}


def _config(settings: FleetSettings) -> ServeConfig:
    return ServeConfig(
        model=ModelConfig(model="timed"),
        engine=settings.engine(),
        gateway=GatewayConfig(grpc_port=0, http_port=0, max_queued_requests=4096, num_gateways=settings.num_gateways),
        fleet=FleetConfig(num_replicas=settings.num_replicas),
    )


@dataclass(slots=True)
class _StartedGateway:
    addresses: Addresses

    async def wait_dead(self) -> str:
        """Its process lives as long as the benchmark."""
        await asyncio.Event().wait()
        raise AssertionError("nothing ends this wait")

    async def end(self) -> None:
        """The benchmark ends it."""


class _GatewayLauncher:
    """The controller's GatewayLauncher: tells each process, which waits for it, who it is."""

    def __init__(self, calls: Mapping[str, Connection]) -> None:
        self._calls = calls

    async def launch(self, identity: Identity, *, controller_address: str) -> _StartedGateway:
        connection = self._calls[identity.name]
        connection.send((identity, controller_address))
        return _StartedGateway(await asyncio.to_thread(connection.recv))

    async def find(self) -> Mapping[str, _StartedGateway]:
        return {}


def _gateway(settings: FleetSettings, calls: Connection) -> None:
    """A gateway's process: serves until the controller's closes the connection."""

    async def serve() -> None:
        identity, address = calls.recv()
        grpc_wakeups.take_all_at_once(asyncio.get_running_loop())
        gateway = Gateway(_config(settings), model_path=settings.path, identity=identity, controller_address=address)
        addresses = await gateway.start()
        garbage.settle()
        calls.send(addresses)
        await asyncio.to_thread(_until_closed, calls)
        os._exit(0)

    asyncio.run(serve())


def _control(settings: FleetSettings, calls: Connection, parent: Connection, gateways: Mapping[str, Connection]) -> None:
    """The controller's process: sends the addresses of its doors, then serves until the parent closes the connection."""

    async def serve() -> None:
        authority = Authority.create()
        grpc_wakeups.take_all_at_once(asyncio.get_running_loop())
        controller = Controller(
            _config(settings),
            model_path=Path(settings.path),
            launcher=_HostLauncher(calls, authority),
            authority=authority,
            controller_id="benchmark",
            gateway_launcher=_GatewayLauncher(gateways),
        )
        addresses = await controller.start()
        await controller.wait_ready()
        garbage.settle()
        while not all(gateway.is_connected for gateway in controller.status().gateways):  # noqa: ASYNC110 - once
            await asyncio.sleep(0.05)
        parent.send(([gateway.grpc_address for gateway in controller.status().gateways] or [addresses.grpc], addresses.http))
        await asyncio.to_thread(_until_closed, parent)
        await controller.stop()

    asyncio.run(serve())


def _until_closed(connection: Connection) -> None:
    try:
        connection.recv()
    except EOFError:
        return


class TimedFleet:
    """See the module. Entered, the doors are at `addresses` (gRPC), one a gateway, and `http_address` (where there is none)."""

    def __init__(self, settings: FleetSettings) -> None:
        host_calls, controller_calls = _PROCESSES.Pipe()
        self._answers, host_answers = _PROCESSES.Pipe()
        self._parent, controller_parent = _PROCESSES.Pipe()
        pipes = {f"gateway-{index}": _PROCESSES.Pipe() for index in range(settings.num_gateways)}
        to_gateways = {name: ours for name, (ours, _) in pipes.items()}
        self._ends = (
            host_calls,
            controller_calls,
            host_answers,
            controller_parent,
            *(end for ends in pipes.values() for end in ends),
        )
        self._gateways = [
            _PROCESSES.Process(target=_gateway, args=(settings, theirs), daemon=True) for _, theirs in pipes.values()
        ]
        self._host = _PROCESSES.Process(target=_host, args=(settings, host_calls, host_answers), daemon=True)
        self._controller = _PROCESSES.Process(
            target=_control, args=(settings, controller_calls, controller_parent, to_gateways), daemon=True
        )
        self.addresses: list[str] = []
        self.http_address = ""

    def __enter__(self) -> TimedFleet:
        self._host.start()
        for process in (self._controller, *self._gateways):
            process.start()
        for end in self._ends:
            end.close()
        if not self._parent.poll(_START_S):
            raise SystemExit(f"the controller did not serve within {_START_S:g} s; its messages are above")
        self.addresses, self.http_address = self._parent.recv()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._parent.close()
        self._controller.join(30)
        self._answers.close()
        self._host.join(30)
        for process in (self._controller, self._host, *self._gateways):
            process.kill()

    def emissions(self) -> Mapping[tuple[str, int], float]:
        """When the tokens since the last call came into being, by (request id, output position); monotonic seconds."""
        self._answers.send(None)
        return self._answers.recv()

    def controller_cpu_s(self) -> float:
        """CPU time of the controller's process so far."""
        return cpu_seconds_of(self._controller.pid)

    def replicas_cpu_s(self) -> float:
        """CPU time of the replicas' process so far."""
        return cpu_seconds_of(self._host.pid)

    def gateways_cpu_s(self) -> float:
        """CPU time of all gateways' processes so far."""
        return sum(cpu_seconds_of(process.pid) for process in self._gateways)

    def controller_rss_mib(self) -> float:
        """Memory of the controller's process."""
        lines = Path(f"/proc/{self._controller.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


def cpu_seconds_of(pid: int | None) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
