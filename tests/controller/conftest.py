"""A controller over workers in this process: everything real but the model and Ray. And a Ray, for tests of what is on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from local_gateways import LocalGatewayLauncher
from local_workers import Cluster, LocalLauncher, StartCluster
from pilotfish.common.config import EngineConfig, FleetConfig, GatewayConfig, ModelConfig, ServeConfig, TenantConfig
from pilotfish.controller.controller import Controller
from ray_nodes import own_ray
from reading import eventually
from small_model import save_tiny_llama, save_tokenizer


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def start_cluster(tokenizer_path: Path) -> AsyncIterator[StartCluster]:
    started: list[Controller] = []

    async def start(
        *,
        launcher: LocalLauncher | None = None,
        fleet: dict[str, Any] | None = None,
        gateway: dict[str, Any] | None = None,
        tenants: dict[str, TenantConfig] | None = None,
        stall_timeout_s: float = 60.0,
        wait: bool = True,
        journal_path: Path | None = None,
        gateways: LocalGatewayLauncher | None = None,
        **engine_options: Any,
    ) -> Cluster:
        launcher = launcher or LocalLauncher(engine_options=engine_options)
        config = ServeConfig(
            model=ModelConfig(model="tiny"),
            engine=EngineConfig(stall_timeout_s=stall_timeout_s),
            gateway=GatewayConfig(**{"grpc_port": 0, "http_port": 0, **(gateway or {})}),
            fleet=FleetConfig(**{"heartbeat_timeout_s": 5.0, **(fleet or {})}),
            tenants=tenants or {},
        )
        if config.gateway.num_gateways and gateways is None:
            gateways = LocalGatewayLauncher(config, tokenizer_path)
        controller = Controller(
            config,
            model_path=tokenizer_path,
            launcher=launcher,
            authority=launcher.authority,
            controller_id="test",
            journal_path=journal_path,
            gateway_launcher=gateways,
        )
        started.append(controller)
        await controller.start()
        if wait:
            await controller.wait_ready()
            if gateways is not None:
                await eventually(lambda: all(g.service.models() for g in gateways.launched))
        return Cluster(controller, launcher, gateways)

    yield start
    for controller in started:
        await controller.stop()


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of this test module's own: two modules may have theirs at the same time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # as the commands set it: workers would have to wait for everything else
        with own_ray(num_cpus=2, namespace="pilotfish-test"):
            yield


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))
