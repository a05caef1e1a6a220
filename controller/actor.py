"""The controller as a Ray actor: detached, restarted by Ray whenever its process dies, serving on the actor's own event loop.

Ray makes a new one with the same arguments; it opens the same ports, takes over the workers that live, and goes on with the
requests whose clients come back (the SDK's do by themselves).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import tempfile
import warnings
from pathlib import Path

import ray
from ray.actor import ActorClass

from ..common import garbage, logs
from ..common.cluster_state import ClusterState
from ..common.config import ServeConfig
from ..common.errors import InternalError, PilotfishError, Unavailable
from . import grpc_wakeups
from .authority import Authority
from .controller import Controller
from .gateway_actor import RayGatewayLauncher
from .ray_launcher import RayLauncher
from .service import Addresses
from .trace_setup import tracing_from_environment

logger = logging.getLogger(__name__)


class ControllerActor:
    """deployment.py makes it an actor. Errors come typed, as a RayTaskError's cause."""

    async def __init__(  # type: ignore[misc]
        self, config: ServeConfig, model_path: str, worker_class: ActorClass, authority: Authority
    ) -> None:
        logs.set_up("controller", log_level=config.log.log_level, log_format=config.log.log_format)
        self._controller: Controller | None = None
        self._ready = asyncio.create_task(self._bring_up(config, model_path, worker_class, authority))

    async def wait_ready(self) -> Addresses:
        """Until every replica serves; where the doors are.

        Raises:
            PilotfishError: why a door or a replica cannot serve.
        """
        return await asyncio.shield(self._ready)

    async def status(self) -> ClusterState:
        """Raises Unavailable while the model's tokenizer is still being loaded."""
        if self._controller is None:
            raise Unavailable("the controller is starting", retry_after_s=1.0)
        return self._controller.status()

    async def roll_out(self, model: str, model_path: str, version: str) -> None:
        """See `Controller.roll_out`. It goes on where the caller does not wait for it."""
        if self._controller is None:
            raise Unavailable("the controller is starting", retry_after_s=1.0)
        await asyncio.shield(asyncio.create_task(self._controller.roll_out(model, model_path=model_path, version=version)))

    async def shutdown(self, grace_s: float) -> None:
        """Refuse new requests, give running ones `grace_s`, end all workers. The caller ends this actor afterwards."""
        if self._controller is not None:
            await self._controller.stop(grace_s=grace_s)
        self._ready.cancel()

    async def _bring_up(
        self, config: ServeConfig, model_path: str, worker_class: ActorClass, authority: Authority
    ) -> Addresses:
        with warnings.catch_warnings():  # Ray warns of a name that this property itself uses
            warnings.simplefilter("ignore")
            is_restart = ray.get_runtime_context().was_current_actor_reconstructed
        if is_restart:
            logger.warning("the controller was restarted; taking over its workers")
        grpc_wakeups.take_all_at_once(asyncio.get_running_loop())
        try:
            self._controller = Controller(
                config,
                model_path=model_path,
                launcher=RayLauncher(worker_class, config, authority),
                authority=authority,
                controller_id=f"{os.getpid()}-{secrets.token_hex(4)}",
                tracing=tracing_from_environment(os.environ),
                journal_path=_journal_path(authority),
                gateway_launcher=RayGatewayLauncher(config, model_path),
            )
            addresses = await self._controller.start(is_restart=is_restart)
            await self._controller.wait_ready()
            garbage.settle()
        except PilotfishError as error:
            logger.error("cannot serve: %s", error.message)
            raise
        except Exception as error:
            logger.exception("cannot serve")
            raise InternalError(f"the controller failed while starting: {type(error).__name__}: {error}") from error
        return addresses


def _journal_path(authority: Authority) -> Path:
    """The same for every restart of one deployment's controller on a node, and for no other deployment."""
    name = hashlib.sha256(authority.certificate).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"pilotfish-{os.getuid()}" / f"requests-{name}.sqlite"
