"""Both doors over one service, in the controller's process or in a gateway's: opened together, closed together.

Life: `open`, which may be tried again after an error; `close`, which may be called at any time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ..common.config import GatewayConfig
from ..text.tokenizer import Tokenizer
from .grpc_gateway import GrpcGateway
from .http_gateway import HttpGateway, RenderMetrics
from .service import Addresses, InferenceService

logger = logging.getLogger(__name__)


class Doors:
    """See the module's docstring. `render_metrics` gives what GET /metrics shows."""

    def __init__(
        self, service: InferenceService, tokenizer: Tokenizer, config: GatewayConfig, *, render_metrics: RenderMetrics
    ) -> None:
        self._service = service
        self._tokenizer = tokenizer
        self._config = config
        self._render_metrics = render_metrics
        self._grpc: GrpcGateway | None = None
        self._http: HttpGateway | None = None

    async def open(self) -> None:
        """Listen; the service gets the addresses.

        Raises:
            ConfigError: a port is in use; both doors are closed.
        """
        self._grpc = GrpcGateway(self._service, self._tokenizer, self._config)
        self._http = HttpGateway(self._service, self._tokenizer, self._render_metrics, self._config)
        try:
            self._service.addresses = Addresses(grpc=await self._grpc.start(), http=await self._http.start())
        except BaseException:
            await self.close()
            raise
        logger.info("gRPC on %s, HTTP on %s", self._service.addresses.grpc, self._service.addresses.http)

    async def follow_health(self, changed: asyncio.Event, is_serving: Callable[[], bool]) -> None:
        """Until cancelled, the gRPC health service says what `is_serving` says, asked again whenever `changed` is set."""
        while self._grpc is not None:
            changed.clear()
            self._grpc.set_serving(is_serving())
            await changed.wait()

    async def close(self) -> None:
        """Requests under way get a few seconds."""
        doors, self._grpc, self._http = [self._grpc, self._http], None, None
        await asyncio.gather(*(door.stop() for door in doors if door is not None))
