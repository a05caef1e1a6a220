"""Whether a deployment's ranks fit the nodes that Ray has, and what would: asked before anything is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from ..common.config import ParallelConfig, ServeConfig
from ..common.errors import ConfigError


def settle_device(config: ServeConfig, nodes: Sequence[Mapping[str, float]]) -> Literal["cpu", "cuda"]:
    """What device `auto` means on nodes with these resources, by Ray's names: a GPU where there is one.

    Raises:
        ConfigError: the nodes have not room for all ranks, not even empty; with layouts that would fit. Not where the number of
            replicas follows the load, for then nodes may come.
    """
    device = config.engine.device
    if device == "auto":
        device = "cuda" if any(node.get("GPU", 0.0) >= 1 for node in nodes) else "cpu"
    bundle = rank_bundle(config.parallel, device)
    if not bundle or config.fleet.is_elastic:
        return device
    num_places = sum(min(_num_times(amount, node.get(what, 0.0)) for what, amount in bundle.items()) for node in nodes)
    num_replicas, num_ranks = config.fleet.num_replicas, config.parallel.num_ranks
    if num_places < num_replicas * num_ranks:
        layouts = _that_fit(config.parallel, num_replicas, num_places)
        need = " and ".join(f"{amount:g} {what}" for what, amount in bundle.items())
        raise ConfigError(
            f"num_replicas {num_replicas} x tensor_parallel {config.parallel.tensor_parallel} x data_parallel "
            f"{config.parallel.data_parallel} are {num_replicas * num_ranks} ranks of {need} each, and the Ray cluster's "
            f"{len(nodes)} nodes have room for {num_places}. "
            + (f"Would fit: {'; or '.join(layouts)}. " if layouts else "")
            + ("Else add nodes, or use CPUs with device cpu" if device == "cuda" else "Else add nodes, or lower cpus_per_rank")
        )
    return device


def rank_bundle(parallel: ParallelConfig, device: str) -> dict[str, float]:
    """What a rank takes in Ray's books."""
    return ({"GPU": 1.0} if device == "cuda" else {}) | ({"CPU": parallel.cpus_per_rank} if parallel.cpus_per_rank else {})


def _num_times(amount: float, total: float) -> int:
    """How often it is in there, in Ray's units: ten-thousandths, in which 7 CPUs are a hundred times 0.07."""
    return round(total * 10_000) // max(round(amount * 10_000), 1)


def _that_fit(parallel: ParallelConfig, num_replicas: int, num_places: int) -> list[str]:
    """One setting lowered at a time, and all of the places for one replica where that is not enough."""
    tensor, data = parallel.tensor_parallel, parallel.data_parallel
    least_tensor = 2 if parallel.expert_parallel and data == 1 else 1
    layouts = []
    if num_places >= tensor * data:
        layouts.append(f"num_replicas {num_places // (tensor * data)}")
    if (most := num_places // (num_replicas * data)) >= least_tensor and tensor > 1:
        layouts.append(f"tensor_parallel {most}")
    if (most := num_places // (num_replicas * tensor)) >= (1 if tensor > 1 else 2) and data > 1:
        layouts.append(f"data_parallel {most}")
    if not layouts and num_places >= max(data, least_tensor):
        layouts.append(f"num_replicas 1 with tensor_parallel {num_places // data}")
    return layouts
