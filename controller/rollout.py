"""Another version of the model, a replica at a time, while requests are served.

A new replica starts; when it serves, an old one drains and leaves, and so on. Streams stay with the version that they began on:
those of a replica that leaves too early for them go on on another old one, and the last old one stays until its streams have
ended. If a new replica cannot start, those that have are replaced by old ones again in the same way. It takes room for one more
replica than there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

from ..common.config import ModelConfig
from ..common.errors import ConfigError, InternalError, PilotfishError
from .fleet import Fleet
from .replica import Replica

logger = logging.getLogger(__name__)

_INTERVAL_S = 0.05
_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def check_same_texts(served_path: str | Path, model_path: str | Path) -> None:
    """Requests are prepared, and texts made, as for the model that is served first.

    Raises:
        ConfigError: another model's directory has another tokenizer, template or generation configuration.
    """
    differing = [name for name in _TEXT_FILES if _content(Path(served_path) / name) != _content(Path(model_path) / name)]
    if differing:
        raise ConfigError(
            f"{model_path} cannot follow what is served here: its {', '.join(differing)} differ. A rollout changes weights "
            "alone; serve the other model beside this one"
        )


class Rollout:
    """`run` for each; one at a time. The fleet's number is left alone meanwhile (`is_under_way`)."""

    def __init__(self, fleet: Fleet, *, drain_timeout_s: float, last_drain_timeout_s: float) -> None:
        self._fleet = fleet
        self._drain_timeout_s = drain_timeout_s
        self._last_drain_timeout_s = last_drain_timeout_s
        self.is_under_way = False

    async def run(self, model: ModelConfig) -> None:
        """Until every replica is of `model`.

        Raises:
            ConfigError: another rollout is under way, or this version is served already.
            PilotfishError: why the first replica that could not start did not; all are of the version before then.
        """
        before = self._fleet.model
        if self.is_under_way:
            raise ConfigError("a rollout is under way already; wait until it has ended")
        if model.model_version == before.model_version:
            raise ConfigError(
                f"the version {model.model_version!r} is served already; give these weights another one with --model-version"
            )
        self.is_under_way = True
        try:
            await self._change_to(model)
        except PilotfishError as error:
            logger.error("the rollout of version %s failed, and is taken back: %s", model.model_version, error.message)
            with contextlib.suppress(PilotfishError):  # it is in the log
                await self._change_to(before)
            raise
        finally:
            self.is_under_way = False

    async def _change_to(self, model: ModelConfig) -> None:
        fleet = self._fleet
        fleet.model = model
        if not fleet.staying:  # it shows whether they load
            await self._start(fleet.add())
        while old := [replica for replica in fleet.staying if replica.model != model]:
            await self._start(fleet.add())
            leaving = min(old, key=fleet.worth)
            limit_s = self._drain_timeout_s if len(old) > 1 else self._last_drain_timeout_s
            fleet.let_go(leaving, f"version {model.model_version!r} replaces it", within_s=limit_s)
            while fleet.is_here(leaving):  # noqa: ASYNC110 - for as long as its streams take
                await asyncio.sleep(_INTERVAL_S)

    async def _start(self, replica: Replica) -> None:
        """Until it serves; one that cannot is forgotten."""
        await replica.settled.wait()
        if replica.error is not None:
            self._fleet.let_go(replica, replica.error.message, within_s=0.0)
            raise replica.error
        if not self._fleet.is_here(replica):
            raise InternalError(f"{replica.name} was ended before it served")


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
