"""Room for a replica's ranks on the nodes of the Ray cluster: a placement group, a bundle a rank.

Ray takes half a minute to call a node dead that was cut off, and until then reserves room there that nobody can use. So nodes
whose raylet does not answer the controller are left out, and a group that Ray has not placed is asked for anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from .worker_process import NoRoom

_STRATEGIES = {"pack": "PACK", "spread": "SPREAD"}
_PATIENCE_S = 1.0
_ATTEMPT_S = 15.0
_ANSWER_TIMEOUT_S = 1.0


async def place(
    name: str,
    bundle: Mapping[str, float],
    *,
    num_ranks: int,
    data_ranks: int,
    placement: str,
    timeout_s: float,
    on_wait: Callable[[str], None],
    without: Sequence[str] = (),
) -> PlacementGroup:
    """All ranks at once, on none of the nodes `without`. A group that waits is what makes Ray's autoscaler add nodes.

    Bundles are for equally many neighbouring ranks: for one each, or, where there are several data ranks, for the tensor ranks
    of one if a node is large enough. Those exchange two messages a layer; data ranks share no more than the experts.

    Raises:
        NoRoom: the cluster has not had room for them within `timeout_s`; the message says what is missing.
    """
    deadline = time.monotonic() + timeout_s
    what = f"{num_ranks} ranks need {dict(bundle)} each" if num_ranks > 1 else f"it needs {dict(bundle)}"
    while True:
        selector = await reachable_only(without)
        together = _largest_bundle(bundle, num_ranks // data_ranks) if data_ranks > 1 else 1
        bundles = [{resource: together * amount for resource, amount in bundle.items()}] * (num_ranks // together)
        group = placement_group(
            bundles,
            strategy=_STRATEGIES[placement],
            name=name,
            lifetime="detached",
            bundle_label_selector=[selector] * len(bundles) if selector else None,
        )
        ready = asyncio.ensure_future(_as_future(group))
        try:
            done, _ = await asyncio.wait([ready], timeout=_PATIENCE_S)
            if not done:
                on_wait(f"waits for a node: {what}")
                done, _ = await asyncio.wait([ready], timeout=_ATTEMPT_S)
                if done:
                    on_wait("")
            if done:
                ready.result()
                return group
        except BaseException:
            remove_placement_group(group)
            raise
        finally:
            ready.cancel()
        remove_placement_group(group)
        if time.monotonic() > deadline:
            free = ray.available_resources()
            left_out = f" ({len(without)} nodes that others cannot reach are left out)" if without else ""
            raise NoRoom(
                f"{what}, and the Ray cluster has not had that free within "
                f"{timeout_s:g} s: {free.get('GPU', 0):g} GPUs and {free.get('CPU', 0):g} CPUs are free{left_out}. "
                "Add nodes, end other work or lower tensor_parallel or data_parallel"
            )


def _largest_bundle(bundle: Mapping[str, float], num_ranks: int) -> int:
    """`num_ranks` if some node has that many times the bundle, else 1."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = any(all(node.get(resource, 0.0) >= num_ranks * amount for resource, amount in bundle.items()) for node in nodes)
    return num_ranks if fits else 1


async def reachable_only(without: Sequence[str] = ()) -> dict[str, str]:
    """A label selector that leaves out nodes `without` and those that Ray calls alive and that do not answer; {} if all do."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    answers = await asyncio.gather(*map(_answers, nodes))
    left_out = [*without, *(node["NodeID"] for node, is_here in zip(nodes, answers, strict=True) if not is_here)]
    return {"ray.io/node-id": f"!in({','.join(left_out)})"} if left_out else {}


async def is_any_gone(node_ids: Collection[str]) -> bool:
    """Whether one of the nodes does not answer, or Ray calls it dead. It takes a second where it was cut off."""
    nodes = {node["NodeID"]: node for node in await asyncio.to_thread(ray.nodes) if node["Alive"]}
    if not all(node_id in nodes for node_id in node_ids):
        return True
    wanted = [nodes[node_id] for node_id in node_ids]
    return not all(await asyncio.gather(*map(_answers, wanted)))


def find_group(name: str) -> PlacementGroup | None:
    """The group of that name in the current namespace."""
    try:
        return ray.util.get_placement_group(name)
    except ValueError:
        return None


async def _answers(node: Mapping[str, Any]) -> bool:
    host, port = node["NodeManagerAddress"], node["NodeManagerPort"]
    try:
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


async def _as_future(group: PlacementGroup) -> object:
    return await group.ready()
