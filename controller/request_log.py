"""A log record for each request that has ended, with its numbers: failures at INFO, the others at DEBUG."""

from __future__ import annotations

import logging

from ..common import logs
from .events import Observer, RequestRecord

logger = logging.getLogger(__name__)


class RequestLog(Observer):
    """An Observer."""

    def on_request_end(self, record: RequestRecord) -> None:
        level = logging.INFO if record.error_code else logging.DEBUG
        if not logger.isEnabledFor(level):
            return
        usage, outcome = record.usage, record.error_code or "ok"
        logger.log(
            level,
            "%s ended (%s) after %.0f ms with %d tokens",
            record.request_id,
            outcome,
            usage.total_ms,
            usage.completion_tokens,
            extra=logs.about(
                record.request_id,
                outcome=outcome,
                replica=usage.replica or None,
                num_attempts=record.num_attempts,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                completion_tokens=usage.completion_tokens,
                queue_ms=round(usage.queue_ms, 3),
                ttft_ms=round(usage.ttft_ms, 3) if record.has_first_token else None,
                total_ms=round(usage.total_ms, 3),
            ),
        )
