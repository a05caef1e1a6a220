"""What fits the nodes of a cluster, and what is said of a layout that does not."""

from __future__ import annotations

from itertools import product

import pytest
from pilotfish.common.config import EngineConfig, FleetConfig, ModelConfig, ParallelConfig, ServeConfig
from pilotfish.common.errors import ConfigError
from pilotfish.controller.layouts import settle_device

GPUS = [{"CPU": 32.0, "GPU": 8.0}, {"CPU": 32.0, "GPU": 8.0}]
EXPERTS = {"expert_parallel": True}


def config(device: str = "auto", *, num_replicas: int = 1, max_replicas: int | None = None, **parallel) -> ServeConfig:
    return ServeConfig(
        model=ModelConfig(model="some"),
        engine=EngineConfig(device=device),
        parallel=ParallelConfig(**parallel),
        fleet=FleetConfig(num_replicas=num_replicas, max_replicas=max_replicas),
    )


def test_auto_is_a_gpu_where_there_is_one() -> None:
    assert settle_device(config(tensor_parallel=16), GPUS) == "cuda"
    assert settle_device(config(tensor_parallel=3), [{"CPU": 2.0}]) == "cpu"
    assert settle_device(config("cpu", num_replicas=99), GPUS) == "cpu"


def test_parts_of_a_cpu_are_counted_as_ray_counts_them() -> None:
    hundred = config("cpu", num_replicas=100, cpus_per_rank=0.07)
    assert settle_device(hundred, [{"CPU": 7.0}]) == "cpu"
    with pytest.raises(ConfigError, match="have room for 99"):
        settle_device(hundred, [{"CPU": 6.99}])


def test_a_fleet_that_grows_may_wait_for_nodes() -> None:
    assert settle_device(config("cuda", max_replicas=4), []) == "cuda"


@pytest.mark.parametrize(
    ("wanted", "nodes", "message"),
    [
        (config(tensor_parallel=32), GPUS, "2 nodes have room for 16. Would fit: tensor_parallel 16."),
        (config(tensor_parallel=4, num_replicas=5), GPUS, "Would fit: num_replicas 4; or tensor_parallel 3."),
        (config(tensor_parallel=2, data_parallel=16, **EXPERTS), GPUS, "Would fit: tensor_parallel 1; or data_parallel 8."),
        (config(tensor_parallel=4, num_replicas=9), GPUS[:1], "Would fit: num_replicas 2."),
        (config(tensor_parallel=16, num_replicas=9), GPUS[:1], "Would fit: num_replicas 1 with tensor_parallel 8."),
        (config(tensor_parallel=2, **EXPERTS), [{"GPU": 1.0}], "have room for 1. Else add nodes, or use CPUs with device cpu"),
        (config("cuda", tensor_parallel=2), [{"CPU": 8.0}], "have room for 0. Else add nodes, or use CPUs with device cpu"),
        (config(tensor_parallel=8, cpus_per_rank=6), GPUS[:1], "8 ranks of 1 GPU and 6 CPU each"),
        (config("cpu", num_replicas=3, cpus_per_rank=3), [{"CPU": 4.0}] * 2, "num_replicas 2. Else add nodes, or lower"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_what_would(wanted: ServeConfig, nodes: list[dict[str, float]], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        settle_device(wanted, nodes)
    assert message in refusal.value.message


def test_what_would_fit_does() -> None:
    """Each layout that a message names is taken in its turn."""
    checked = 0
    for tensor, data, replicas, whole in product((1, 2, 5, 16), (1, 2, 6), (1, 3, 9), (False, True)):
        if (data > 1 and not whole) or (whole and tensor * data == 1):
            continue
        own = {"tensor_parallel": tensor, "data_parallel": data, "num_replicas": replicas, "expert_parallel": whole}
        try:
            settle_device(config("cuda", **own), GPUS)
        except ConfigError as refusal:
            _, _, layouts = refusal.message.partition("Would fit: ")
            for layout in layouts.partition(". ")[0].split("; or ") if layouts else []:
                words = layout.replace(" with ", " ").split()
                changes = dict(zip(words[::2], map(int, words[1::2]), strict=True))
                settle_device(config("cuda", **(own | changes)), GPUS)
                checked += 1
    assert checked > 20
