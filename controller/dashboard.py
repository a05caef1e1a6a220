"""The live page at /dashboard: one HTML file without outside resources, and the state that it asks for once a second."""

from __future__ import annotations

import dataclasses
import importlib.resources
from functools import cache
from typing import Any

from starlette.responses import Response

from ..common.cluster_state import ClusterState

_LOAD_FIELDS = ("num_running", "num_waiting", "num_used_blocks", "num_cached_blocks", "num_free_blocks", "num_preemptions")
_STATE_FIELDS = (
    "version", "model", "uptime_s", "num_queued", "num_running", "num_requests", "num_restarts",
    "num_prompt_tokens", "num_cached_tokens", "num_generated_tokens",
)  # fmt: skip
_HEADERS = {
    # The page may run its own script and ask its own server, nothing else.
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}


def page() -> Response:
    return Response(_html(), media_type="text/html", headers=_HEADERS)


def state_json(state: ClusterState) -> dict[str, Any]:
    """What the page shows. Nothing of requests or keys: whoever reaches the port may see it."""
    return {
        **{name: getattr(state, name) for name in _STATE_FIELDS},
        "replicas": [
            {
                "name": replica.name,
                "state": replica.state.value,
                "message": replica.message,
                "restarts": replica.restarts,
                "last_step_age_s": replica.last_step_age_s,
                "num_generated_tokens": replica.num_generated_tokens,
                **{name: getattr(replica.load, name) for name in _LOAD_FIELDS},
                "expert_balance": replica.load.expert_balance and dataclasses.asdict(replica.load.expert_balance),
            }
            for replica in state.replicas
        ],
    }


@cache
def _html() -> bytes:
    return importlib.resources.files(__package__).joinpath("dashboard.html").read_bytes()
