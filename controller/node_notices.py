"""Which nodes are about to go: Ray is told so by its autoscaler, a cloud's preemption handler or `ray drain-node`, and starts
nothing new there. Asked once a second for all who want to know.

Ray 2.60 has no public call for it; Ray Serve and Ray Train ask the same one.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Collection, Mapping

import ray

logger = logging.getLogger(__name__)

_INTERVAL_S = 1.0


class NodeNotices:
    """The drain notices of a Ray cluster."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._asked = -math.inf
        self._deadlines_ms: Mapping[str, int] = {}

    async def wait_for(self, nodes: Collection[str]) -> float:
        """Returns when one of the nodes is to go, with the seconds until then: infinite where Ray knows no deadline."""
        while not (found := [ms for node, ms in (await self._ask()).items() if node in nodes]):  # noqa: ASYNC110 - Ray has no event
            await asyncio.sleep(_INTERVAL_S)
        return min(deadline_ms / 1000 - time.time() if deadline_ms else math.inf for deadline_ms in found)

    async def is_any_about_to_go(self, nodes: Collection[str]) -> bool:
        known = await self._ask()
        return any(node in known for node in nodes)

    async def _ask(self) -> Mapping[str, int]:
        """Deadlines in milliseconds of Unix time by node id, 0 where there is none; as known a second ago at most."""
        async with self._lock:
            if time.monotonic() - self._asked >= _INTERVAL_S:
                try:
                    self._deadlines_ms = await asyncio.to_thread(ray._private.state.state.get_draining_nodes)
                except Exception as error:  # noqa: BLE001 - whatever Ray raises while its head is away
                    logger.warning("Ray cannot be asked which nodes are about to go: %s", error)
                self._asked = time.monotonic()
        return self._deadlines_ms
