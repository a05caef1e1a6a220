"""Who a request is from. Its API key says it; without any keys everybody is ANONYMOUS."""

from __future__ import annotations

from dataclasses import dataclass

ANONYMOUS_NAME = "anonymous"


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant gets `weight` parts of the cluster while others want it too."""

    name: str
    weight: float = 1.0


ANONYMOUS = Tenant(ANONYMOUS_NAME)
