"""The worker's gRPC server: the Worker service around one engine, health that means progress, and reflection.

It runs on a thread and event loop of its own, the engine on another, and neither waits for the other: `on_step` hands a step
over with one wake-up, submits and aborts go into the engine's command queue.

Life: construct, give `on_step` to the engine, `start` once the engine runs, `stop` at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ..common.errors import InternalError
from ..common.identity import Identity
from ..common.requests import StepOutput, WorkerInfo
from ..proto.credentials import server_credentials
from .engine_interface import EngineInterface
from .worker_service import SERVICE_NAME, ServerLimits, WorkerService

logger = logging.getLogger(__name__)

_OPTIONS = [
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]
_HEALTH_INTERVAL_S = 0.25
_STOP_TIMEOUT_S = 5.0


class WorkerServer:
    """Serves one engine to one controller at a time, which shows a certificate of the authority that `identity` names."""

    def __init__(self, limits: ServerLimits, identity: Identity) -> None:
        self._limits = limits
        self._identity = identity
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="worker-server", daemon=True)
        self._service: WorkerService | None = None
        self._server: grpc.aio.Server | None = None
        self._health_task: asyncio.Task[None] | None = None

    def on_step(self, step: StepOutput) -> None:
        """Called on the engine's thread, from after `start` on; returns at once. After `stop` nobody is left to tell."""
        assert self._service is not None, "the engine made a step before the server was started"
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._service.receive, step)

    def start(self, engine: EngineInterface, info: WorkerInfo, *, host: str, port: int = 0) -> str:
        """Serve; returns the address "host:port".

        Raises:
            InternalError: the address cannot be bound.
        """
        self._service = WorkerService(engine, info, limits=self._limits)
        self._thread.start()
        return self._call(self._serve(self._service, engine, f"{host}:{port}"))

    def stop(self) -> None:
        """End the connections and the thread. May be called before `start`, and again."""
        if self._thread.is_alive():
            self._call(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_STOP_TIMEOUT_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(timeout=60)

    async def _serve(self, service: WorkerService, engine: EngineInterface, address: str) -> str:
        server = grpc.aio.server(options=_OPTIONS)
        checks = health.aio.HealthServicer()
        server.add_generic_rpc_handlers((service.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        try:
            port = server.add_secure_port(address, server_credentials(self._identity))
        except RuntimeError as error:
            raise InternalError(f"the worker cannot listen on {address}: {error}") from error
        await server.start()
        self._server = server
        self._health_task = asyncio.create_task(self._watch_health(engine, checks))
        return f"{address.rpartition(':')[0]}:{port}"

    async def _watch_health(self, engine: EngineInterface, checks: health.aio.HealthServicer) -> None:
        """SERVING means that a step completed recently or that there was nothing to do."""
        shown = None
        while True:
            now = engine.health()
            serving = now.ok
            if serving != shown:
                if shown is not None:
                    logger.warning("the engine is %s: %s", "making progress again" if serving else "not serving", now)
                status = health_pb2.HealthCheckResponse
                for service in ("", SERVICE_NAME):
                    await checks.set(service, status.SERVING if serving else status.NOT_SERVING)
                shown = serving
            await asyncio.sleep(_HEALTH_INTERVAL_S)

    async def _close(self) -> None:
        if self._health_task is not None:
            self._health_task.cancel()
        if self._service is not None:
            self._service.close()
        if self._server is not None:
            await self._server.stop(grace=0.2)
