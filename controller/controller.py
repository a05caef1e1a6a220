"""The controller put together, without Ray: entrance, intake, dispatcher and fleet.

Life: `start` opens the doors at once (requests are answered with Unavailable until a replica serves) and starts the fleet;
`wait_ready` says when it serves; `stop` ends requests, workers and doors in this order.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.cluster_state import ClusterState
from ..common.config import ServeConfig
from ..common.errors import ConfigError
from .authority import Authority
from .autoscaler import Autoscaler
from .dispatcher import Dispatcher
from .entrance import GatewayProcesses, OwnDoors
from .fleet import Fleet
from .gateway_fleet import GatewayLauncher
from .intake import Intake
from .journal import Journal
from .metrics import Metrics
from .request_log import RequestLog
from .rollout import Rollout, check_same_texts
from .service import Addresses, InferenceService
from .totals import Totals
from .worker_process import Launcher

if TYPE_CHECKING:
    from .tracing import RequestTracing

logger = logging.getLogger(__name__)

_BIND_PAUSE_S = 0.25
_REBIND_TIMEOUT_S = 20.0


class Controller:
    """See the module's docstring.

    `gateway_launcher` starts gateway processes, if the configuration wants any. `journal_path` is where a successor finds the
    requests in flight; None: they end with this controller.

    Raises:
        ConfigError: the journal cannot be opened.
        ModelLoadError: the model's directory lacks a readable tokenizer, template or generation configuration.
    """

    def __init__(
        self,
        config: ServeConfig,
        *,
        model_path: str | Path,
        launcher: Launcher,
        authority: Authority,
        controller_id: str,
        tracing: RequestTracing | None = None,
        journal_path: Path | None = None,
        gateway_launcher: GatewayLauncher | None = None,
    ) -> None:
        self._model_path = model_path
        metrics, totals = Metrics(), Totals()
        self._tracing = tracing
        observers = (metrics, totals, RequestLog(), *([tracing] if tracing else []))
        self._dispatcher = Dispatcher(
            max_queued=config.gateway.max_queued_requests,
            max_attempts=config.fleet.max_attempts,
            block_size=config.engine.block_size,
            tenant_weights={name: tenant.weight for name, tenant in config.tenants.items()},
            observers=observers,
        )
        self._fleet = Fleet(
            config.fleet,
            model=config.model,
            launcher=launcher,
            dispatcher=self._dispatcher,
            authority=authority,
            controller_id=controller_id,
            stall_timeout_s=config.engine.stall_timeout_s,
        )
        self._rollout = Rollout(
            self._fleet,
            drain_timeout_s=config.fleet.drain_timeout_s,
            last_drain_timeout_s=config.gateway.default_timeout_s,
        )
        self._autoscaler = Autoscaler(config.fleet, fleet=self._fleet, dispatcher=self._dispatcher, rollout=self._rollout)
        self._intake = Intake(
            config=config,
            fleet=self._fleet,
            autoscaler=self._autoscaler,
            dispatcher=self._dispatcher,
            totals=totals,
            journal=Journal(journal_path),
            tracing=tracing,
            observers=observers,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._entrance: OwnDoors | GatewayProcesses
        if not config.gateway.num_gateways:
            self._entrance = OwnDoors(config, self._intake, metrics, model_path=model_path)
        elif gateway_launcher is None:
            raise ConfigError("num_gateways is set where nothing can start gateway processes: leave it 0")
        else:
            self._entrance = GatewayProcesses(config, self._intake, metrics, launcher=gateway_launcher, authority=authority)

    @property
    def service(self) -> InferenceService:
        """Of the doors in this process."""
        assert isinstance(self._entrance, OwnDoors)
        return self._entrance.service

    async def start(self, *, is_restart: bool = False) -> Addresses:
        """Open the doors and start the fleet.

        `is_restart`: it follows one whose process died, whose ports may take a moment to become free.

        Raises:
            ConfigError: a port is in use.
            PilotfishError: why a gateway process cannot start.
        """
        self._intake.restore(self._entrance.make_text)
        deadline = time.monotonic() + (_REBIND_TIMEOUT_S if is_restart else 0.0)
        while True:
            try:
                await self._entrance.open()
                break
            except ConfigError:
                if time.monotonic() >= deadline:
                    raise
            await asyncio.sleep(_BIND_PAUSE_S)
        await self._fleet.start(is_restart=is_restart)
        self._tasks = [asyncio.create_task(self._autoscaler.run())]
        self._tasks[0].add_done_callback(_log_failure)
        return await self._entrance.wait_open()

    async def wait_ready(self) -> None:
        """Until every replica serves; raises why one never will."""
        await self._fleet.wait_ready()

    async def roll_out(self, model: str, *, model_path: str | Path, version: str) -> None:
        """Serve other weights under the same name, a replica at a time; returns when all replicas have them.

        Args:
            model: as workers are to find them: a directory of their nodes, or an id.
            model_path: where they are on this node.

        Raises:
            ConfigError: they do not fit what is served (another tokenizer, ...), or another rollout is under way.
            PilotfishError: why a replica could not start; the version before is served on.
        """
        check_same_texts(self._model_path, model_path)
        served = self._fleet.model
        await self._rollout.run(replace(served, model=model, served_name=served.name, model_version=version))

    async def stop(self, *, grace_s: float = 0.0) -> None:
        """Refuse new requests, give running ones `grace_s`, then end everything. May be called at any time, and again."""
        self._intake.close()
        for task in self._tasks:
            task.cancel()
        await self._fleet.stop(grace_s=grace_s)
        self._intake.end_all()
        await self._entrance.close()
        tracing, self._tracing = self._tracing, None
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    def status(self) -> ClusterState:
        return self._entrance.status()


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("a task of the controller has failed", exc_info=error)
