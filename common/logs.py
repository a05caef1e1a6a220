"""Logging, set up once per process: role and rank in every line, the request id where one is being served.

INFO marks changes of state, DEBUG a step, nothing is logged per token. As text a record is a line for people; as json a line
for a log store, with the request id and the numbers that a call gave in `extra`: `extra=about(request_id, num_tokens=3)`.
"""

from __future__ import annotations

import contextvars
import json
import logging
import os
from datetime import UTC, datetime
from typing import Any

from .errors import ConfigError

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""The request that the current task serves; shown in its log lines."""

LEVEL_VARIABLE, FORMAT_VARIABLE = "PILOTFISH_LOG_LEVEL", "PILOTFISH_LOG_FORMAT"
_FORMATS = ("text", "json")
_TEXT = "%(asctime)s %(levelname).1s %(place)s %(name)s%(request)s: %(message)s"


def about(request: str, **fields: object) -> dict[str, Any]:
    """`extra` of a record about a request that the current task does not serve, with fields of its own."""
    return {"about_request": request, "fields": fields}


class _ContextFilter(logging.Filter):
    def __init__(self, role: str, rank: int | None) -> None:
        super().__init__()
        self._role = role
        self._rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        current = request_id.get()
        record.role, record.rank = self._role, self._rank
        record.place = self._role if self._rank is None else f"{self._role}/{self._rank}"
        record.request = f" [{current}]" if current else ""
        record.request_id = getattr(record, "about_request", current)
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (ISO 8601, UTC), level, role, rank, logger, message, request_id, exception, own fields.

    What does not apply is left out.
    """

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "role": getattr(record, "role", ""),
            "rank": getattr(record, "rank", None),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": getattr(record, "request_id", "") or None,
            **getattr(record, "fields", {}),
            "exception": self.formatException(record.exc_info) if record.exc_info else None,
        }
        return json.dumps({name: value for name, value in entry.items() if value is not None}, ensure_ascii=False, default=str)


def set_up(role: str, *, rank: int | None = None, log_level: str = "auto", log_format: str = "auto") -> None:
    """Send the `pilotfish` loggers to stderr.

    Args:
        rank: which of a replica's ranks this process is, where it has several.
        log_level: auto is PILOTFISH_LOG_LEVEL's, else INFO.
        log_format: text or json; auto is PILOTFISH_LOG_FORMAT's, else text.

    Raises:
        ConfigError: one of the variables has a value of its own.
    """
    level = _choice(log_level, LEVEL_VARIABLE, tuple(logging.getLevelNamesMapping()), "INFO")
    as_json = _choice(log_format, FORMAT_VARIABLE, _FORMATS, "text") == "json"
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter(_TEXT))
    handler.addFilter(_ContextFilter(role, rank))
    logger = logging.getLogger("pilotfish")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level)


def environment(*, log_level: str, log_format: str) -> dict[str, str]:
    """The variables that make `set_up` in another process do the same; those of this process where it is auto."""
    given = {LEVEL_VARIABLE: log_level, FORMAT_VARIABLE: log_format}
    values = {name: os.environ.get(name, "") if value == "auto" else value for name, value in given.items()}
    return {name: value for name, value in values.items() if value}


def _choice(given: str, variable: str, known: tuple[str, ...], default: str) -> str:
    value = given if given != "auto" else os.environ.get(variable) or default
    match = next((name for name in known if name.lower() == value.lower()), None)
    if match is None:
        raise ConfigError(f"{variable} must be one of {', '.join(known)}, not {value!r}")
    return match
