"""Room for a replica's ranks on the nodes of the Ray cluster: a placement group, a bundle a rank.

Ray takes half a minute to call a node dead that was cut off, and until then reserves room there that nobody can use. So nodes
whose raylet does not answer the controller are left out, and a group that Ray has not placed is asked for anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from .worker_process import NoRoom

_STRATEGIES = {"pack": "PACK", "spread": "SPREAD"}
_TIMEOUT_S = 60.0
_ATTEMPT_S = 15.0
_ANSWER_TIMEOUT_S = 1.0


async def place(name: str, bundle: Mapping[str, float], *, num_ranks: int, placement: str) -> PlacementGroup:
    """All ranks at once.

    Raises:
        NoRoom: the cluster has not had room for them within _TIMEOUT_S; the message says what is missing.
    """
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        selector = await reachable_only()
        group = placement_group(
            [dict(bundle)] * num_ranks,
            strategy=_STRATEGIES[placement],
            name=name,
            lifetime="detached",
            bundle_label_selector=[selector] * num_ranks if selector else None,
        )
        try:
            await asyncio.wait_for(_as_future(group), _ATTEMPT_S)
        except BaseException as error:
            remove_placement_group(group)
            if not isinstance(error, TimeoutError):
                raise
        else:
            return group
        if time.monotonic() > deadline:
            free = ray.available_resources()
            raise NoRoom(
                f"{num_ranks} ranks need {dict(bundle)} each, and the Ray cluster has not had that free within "
                f"{_TIMEOUT_S:g} s: {free.get('GPU', 0):g} GPUs and {free.get('CPU', 0):g} CPUs are free. "
                "Add nodes, end other work or lower tensor_parallel or data_parallel"
            )


async def reachable_only() -> dict[str, str]:
    """A label selector that leaves out the nodes which Ray calls alive and which do not answer; {} if all answer."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    answers = await asyncio.gather(*(_answers(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in nodes))
    silent = [node["NodeID"] for node, is_here in zip(nodes, answers, strict=True) if not is_here]
    return {"ray.io/node-id": f"!in({','.join(silent)})"} if silent else {}


def find_group(name: str) -> PlacementGroup | None:
    """The group of that name in the current namespace."""
    try:
        return ray.util.get_placement_group(name)
    except ValueError:
        return None


async def _answers(host: str, port: int) -> bool:
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), _ANSWER_TIMEOUT_S)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


async def _as_future(group: PlacementGroup) -> object:
    return await group.ready()
