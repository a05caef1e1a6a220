"""The gateway processes: started, watched, started again, and ended.

They outlive the controller: one that was restarted finds them, and they it. Life: `start`, then `wait_ready`; `stop` ends them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..common.cluster_state import GatewayStatus
from ..common.errors import InternalError, PilotfishError
from ..common.identity import Identity
from .authority import Authority
from .gateway_server import GATEWAY_PREFIX, GatewayServer
from .service import Addresses

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 120.0
_RESTART_PAUSE_S = (0.0, 1.0, 5.0)
_REATTACH_S = 3.0
_WATCH_INTERVAL_S = 0.5
_SILENCE_TIMEOUT_S = 10.0  # a message comes every second


class GatewayDied(Exception):
    """A gateway process ended before its doors were open; the message has what is known."""


class GatewayProcess(Protocol):
    """One that runs, with its doors open at `addresses`."""

    addresses: Addresses

    async def wait_dead(self) -> str:
        """Returns when the process has ended, with what is known of the cause."""

    async def end(self) -> None:
        """Close its doors, if it still can, and end it."""


class GatewayLauncher(Protocol):
    """Starts gateway processes, and finds those that an earlier controller started."""

    async def launch(self, identity: Identity, *, controller_address: str) -> GatewayProcess:
        """Start one and wait until its doors are open. A cancelled launch leaves no process behind.

        Raises:
            PilotfishError: it cannot start, and why.
            GatewayDied: its process ended.
        """

    async def find(self) -> Mapping[str, GatewayProcess]:
        """Living gateways by name."""


@dataclass(slots=True)
class _Gateway:
    name: str
    process: GatewayProcess | None = None
    message: str = "it is being started"
    addresses: Addresses = field(default_factory=Addresses)
    restarts: int = 0
    failures: int = 0
    error: PilotfishError | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)


class GatewayFleet:
    """See the module's docstring."""

    def __init__(
        self,
        num_gateways: int,
        *,
        launcher: GatewayLauncher,
        server: GatewayServer,
        authority: Authority,
    ) -> None:
        self._launcher = launcher
        self._server = server
        self._authority = authority
        self._gateways = [_Gateway(f"{GATEWAY_PREFIX}{index}") for index in range(num_gateways)]
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, controller_address: str) -> None:
        """Take over living gateways and start the missing ones; returns before those have started.

        The living ones are waited for, a moment: what runs on workers is ended there unless somebody has said that it is his.
        """
        found = dict(await self._launcher.find())
        for gateway in self._gateways:
            gateway.process = found.pop(gateway.name, None)
        for process in found.values():  # of a larger fleet
            await process.end()
        living = [gateway.name for gateway in self._gateways if gateway.process is not None]
        deadline = time.monotonic() + _REATTACH_S
        while not all(map(self._server.connection, living)) and time.monotonic() < deadline:  # noqa: ASYNC110 - once
            await asyncio.sleep(0.02)
        self._tasks = [
            asyncio.create_task(self._lead(gateway, controller_address), name=gateway.name) for gateway in self._gateways
        ]

    async def wait_ready(self) -> Addresses:
        """Until every gateway has its doors open; where those of the first one are.

        Raises:
            PilotfishError: why the first of those that failed did.
        """
        for gateway in self._gateways:
            await gateway.settled.wait()
            if gateway.error is not None:
                raise gateway.error
        return self._gateways[0].addresses

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        processes = [gateway.process for gateway in self._gateways if gateway.process is not None]
        await asyncio.gather(*(process.end() for process in processes))

    def statuses(self) -> tuple[GatewayStatus, ...]:
        connected = {status.name: status for status in self._server.statuses()}
        return tuple(
            replace(
                connected.get(gateway.name) or GatewayStatus(name=gateway.name, is_connected=False, message=gateway.message),
                restarts=gateway.restarts,
            )
            for gateway in self._gateways
        )

    async def _lead(self, gateway: _Gateway, controller_address: str) -> None:
        """One gateway's life."""
        while True:
            try:
                if gateway.process is None:
                    gateway.process = await self._launch(gateway.name, controller_address)
                gateway.addresses = gateway.process.addresses
                gateway.settled.set()
                reason = await self._watch(gateway)
            except PilotfishError as error:
                reason = error.message
                if not gateway.settled.is_set():  # it never had its doors open: who waits wants to know
                    gateway.error = error
                    gateway.settled.set()
                    return
            gateway.message = reason
            gateway.process = None
            logger.warning("%s is lost and will be started again: %s", gateway.name, reason)
            await asyncio.sleep(_RESTART_PAUSE_S[min(gateway.failures, len(_RESTART_PAUSE_S) - 1)])
            gateway.failures += 1
            gateway.restarts += 1

    async def _launch(self, name: str, controller_address: str) -> GatewayProcess:
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                return await self._launcher.launch(self._authority.issue(name), controller_address=controller_address)
        except TimeoutError:
            raise InternalError(f"{name} did not start within {_START_TIMEOUT_S:g} s") from None
        except GatewayDied as death:
            raise InternalError(f"{name} could not start: {death}") from death

    async def _watch(self, gateway: _Gateway) -> str:
        """Returns why its process is of no use any more; it has ended then."""
        assert gateway.process is not None
        watches = [asyncio.create_task(watch) for watch in (gateway.process.wait_dead(), self._until_silent(gateway))]
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            reason = done.pop().result()
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
        await gateway.process.end()
        return reason

    async def _until_silent(self, gateway: _Gateway) -> str:
        heard = time.monotonic()
        while True:
            connection = self._server.connection(gateway.name)
            if connection is not None and connection.last_message_time > heard:
                heard = connection.last_message_time
                gateway.failures = 0
            silent_s = time.monotonic() - heard
            if silent_s > _SILENCE_TIMEOUT_S:
                return f"it has been silent for {silent_s:.1f} s"
            await asyncio.sleep(_WATCH_INTERVAL_S)
