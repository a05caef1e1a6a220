"""Logging, set up once per process: role and rank in every line, the request id where one is being served.

INFO marks changes of state, DEBUG a step, nothing is logged per token.
"""

from __future__ import annotations

import contextvars
import logging
import os

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""The request that the current task serves; shown in its log lines."""

_FORMAT = "%(asctime)s %(levelname).1s %(role)s %(name)s%(request)s: %(message)s"


class _ContextFilter(logging.Filter):
    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def filter(self, record: logging.LogRecord) -> bool:
        current = request_id.get()
        record.role = self._role
        record.request = f" [{current}]" if current else ""
        return True


def set_up(role: str, *, level: str | None = None) -> None:
    """Send the `pilotfish` loggers to stderr; `level` defaults to PILOTFISH_LOG_LEVEL, then INFO."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(_FORMAT))
    handler.addFilter(_ContextFilter(role))
    logger = logging.getLogger("pilotfish")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel((level or os.environ.get("PILOTFISH_LOG_LEVEL") or "INFO").upper())
