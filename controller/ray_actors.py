"""How an actor's process is watched: until it has ended, and what Ray knows of the cause."""

from __future__ import annotations

import asyncio

from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

_WAIT_S = 30.0
_UNAVAILABLE_PAUSE_S = 0.2


async def until_dead(handle: ActorHandle) -> str:
    """Returns when the process of an actor that has a method `wait(timeout_s)` has ended, with the cause."""
    while True:
        try:
            await handle.wait.remote(_WAIT_S)
        except ActorUnavailableError:  # Ray does not know yet
            await asyncio.sleep(_UNAVAILABLE_PAUSE_S)
        except RayActorError as error:
            return cause_of_death(error)


def cause_of_death(error: RayError) -> str:
    """Ray's account without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "its process ended: " + " ".join(lines[:3])
