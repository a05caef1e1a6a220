"""pilotfish serves large language models on a Ray cluster.

The public names load their part on first use, so that `import pilotfish` pulls neither torch nor ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .client import AsyncClient, Client
    from .common.sampling_params import SamplingParams
    from .workers.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "Pipeline", "SamplingParams", "__version__"]

_HOMES = {
    "AsyncClient": ".client",
    "Client": ".client",
    "Pipeline": ".workers.pipeline",
    "SamplingParams": ".common.sampling_params",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
