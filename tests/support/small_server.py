"""A controller with one FakeEngine worker on a thread of its own, for clients that block."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

from local_workers import LocalLauncher
from pilotfish.common.config import GatewayConfig, ModelConfig, ServeConfig
from pilotfish.controller.controller import Controller
from pilotfish.text.tokenizer import Tokenizer
from small_model import save_tokenizer


class SmallServer:
    """Serves inside its `with` block; `address` is its gRPC door, `http_address` its HTTP one."""

    def __init__(self, path: Path, *, max_queued_requests: int = 1024, **engine_options: Any) -> None:
        self._gateway = GatewayConfig(grpc_port=0, http_port=0, max_queued_requests=max_queued_requests)
        self._launcher = LocalLauncher(engine_options=engine_options)
        self._path = save_tokenizer(path)
        self.tokenizer = Tokenizer.from_directory(self._path)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> SmallServer:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._controller.stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    async def _start(self) -> None:
        config = ServeConfig(model=ModelConfig(model="tiny"), gateway=self._gateway)
        self._controller = Controller(
            config, model_path=self._path, launcher=self._launcher, authority=self._launcher.authority, controller_id="test"
        )
        addresses = await self._controller.start()
        self.address, self.http_address = addresses.grpc, addresses.http
        await self._controller.wait_ready()
