"""Other weights while requests are served: every stream is of one version, and nothing is lost."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_engine import expected_tokens
from local_workers import Cluster, LocalLauncher, LocalWorker, StartCluster
from pilotfish.common.cluster_state import ReplicaState
from pilotfish.common.config import ModelConfig
from pilotfish.common.errors import ConfigError, ModelLoadError
from pilotfish.common.hashing import block_hashes, root_hash, version_salt
from pilotfish.controller.service import RequestHandle
from reading import Answer, eventually, read, read_until

PROMPT = list(range(40))
NEW = {"2": {"weights": 2}, "3": {"weights": 3}}


def launcher_of(**options: Any) -> LocalLauncher:
    return LocalLauncher(engine_options={"step_s": 0.002, **options}, options_of_version=NEW)


async def generate(cluster: Cluster, *, max_tokens: int = 20, **options: Any) -> RequestHandle:
    return await cluster.service.start_request(prompt=PROMPT, sampling={"max_tokens": max_tokens}, **options)


def version_of(answer: Answer) -> str:
    """Whose tokens they are, all of them."""
    (choice,) = answer.choices.values()
    said = {version: expected_tokens(PROMPT, len(choice.token_ids), seed=int(version or 0)) for version in ("", "2", "3")}
    (version,) = (version for version, token_ids in said.items() if token_ids == choice.token_ids)
    return version


def versions(cluster: Cluster) -> list[str]:
    return [replica.info.model_version for replica in cluster.service.status().replicas if replica.info]


async def roll_out(cluster: Cluster, path: Path, version: str) -> None:
    await cluster.controller.roll_out(str(path), model_path=path, version=version)


async def test_every_stream_is_of_one_version_and_none_is_refused(start_cluster: StartCluster, tokenizer_path: Path) -> None:
    """Two rollouts under load; the prefix caches of both versions hold the same prompt, each for itself."""
    cluster = await start_cluster(launcher=launcher_of(), fleet={"num_replicas": 3, "drain_timeout_s": 0.1, "max_attempts": 1})
    answers: list[Answer] = []
    done = asyncio.Event()

    async def client() -> None:
        while not done.is_set():
            answers.append(await read(await generate(cluster, max_tokens=40)))

    clients = [asyncio.create_task(client()) for _ in range(6)]
    long = await generate(cluster, max_tokens=500)
    answer = Answer()
    await read_until(long, answer, lambda a: a.num_deltas >= 3)
    await roll_out(cluster, tokenizer_path, "2")
    assert versions(cluster) == ["2"] * 3
    await read(long, into=answer)
    assert version_of(answer) == ""
    await roll_out(cluster, tokenizer_path, "3")
    done.set()
    await asyncio.gather(*clients)
    seen = [version_of(answer) for answer in answers]
    assert seen[0] == ""
    assert {"", "2", "3"} == set(seen)
    assert version_of(await read(await generate(cluster))) == "3"
    await asyncio.sleep(0.1)  # the heartbeat with the last load
    for status in cluster.service.status().replicas:
        assert status.routing is not None
        assert (status.routing.drift_requests, status.routing.drift_blocks) == (0, 0)


async def test_a_version_has_blocks_of_its_own(start_cluster: StartCluster, tokenizer_path: Path) -> None:
    cluster = await start_cluster(launcher=launcher_of())
    await read(await generate(cluster))
    (old,) = cluster.launcher.launched
    assert old.engine.submitted[0].salt == b""
    await roll_out(cluster, tokenizer_path, "2")
    await read(await generate(cluster))
    new = cluster.launcher.launched[-1]
    assert new.engine.submitted[0].salt == version_salt("2", b"") != b""
    root = root_hash(version_salt("2", b""))
    blocks = cluster.controller._dispatcher.router.trie.confirmed_blocks("replica-1")
    assert set(block_hashes(PROMPT, 16, parent=root)) <= blocks
    again = await read(await generate(cluster))
    assert again.usage.cached_tokens == 32


async def test_a_stream_of_the_last_old_replica_keeps_it(start_cluster: StartCluster, tokenizer_path: Path) -> None:
    cluster = await start_cluster(launcher=launcher_of(), fleet={"drain_timeout_s": 0.0})
    long, answer = await generate(cluster, max_tokens=600), Answer()
    await read_until(long, answer, lambda a: a.num_deltas >= 3)
    rollout = asyncio.create_task(roll_out(cluster, tokenizer_path, "2"))
    await eventually(lambda: cluster.service.status().replicas[0].state is ReplicaState.DRAINING)
    assert version_of(await read(await generate(cluster))) == "2"
    assert not rollout.done()
    with pytest.raises(ConfigError, match="a rollout is under way"):
        await roll_out(cluster, tokenizer_path, "3")
    await read(long, into=answer)
    assert version_of(answer) == ""
    await rollout
    assert versions(cluster) == ["2"]


@pytest.mark.parametrize("num_new", [0, 1])
async def test_weights_that_do_not_load_leave_the_old_ones(
    start_cluster: StartCluster, tokenizer_path: Path, num_new: int
) -> None:
    """Also where `num_new` replicas have them already."""

    class BrittleLauncher(LocalLauncher):
        async def launch(self, replica: str, *, model: ModelConfig, **options: Any) -> LocalWorker:
            if model.model_version == "2" and len(self.launched) == 2 + num_new:
                raise ModelLoadError("tensor lm_head.weight is missing")
            return await super().launch(replica, model=model, **options)

    launcher = BrittleLauncher(engine_options={"step_s": 0.002}, options_of_version=NEW)
    cluster = await start_cluster(launcher=launcher, fleet={"num_replicas": 2})
    with pytest.raises(ModelLoadError, match="lm_head"):
        await roll_out(cluster, tokenizer_path, "2")
    assert versions(cluster) == ["", ""]
    assert version_of(await read(await generate(cluster))) == ""
    await roll_out(cluster, tokenizer_path, "3")
    assert versions(cluster) == ["3", "3"]


async def fleet_of_none(start_cluster: StartCluster) -> Cluster:
    cluster = await start_cluster(launcher=launcher_of(), fleet={"min_replicas": 0, "max_replicas": 1, "idle_timeout_s": 0.01})
    await eventually(lambda: versions(cluster) == [])
    return cluster


async def test_a_fleet_of_none_tries_the_weights(start_cluster: StartCluster, tokenizer_path: Path) -> None:
    cluster = await fleet_of_none(start_cluster)
    await roll_out(cluster, tokenizer_path, "2")
    assert version_of(await read(await generate(cluster))) == "2"


async def test_a_fleet_of_none_keeps_the_weights_it_had_where_others_do_not_load(
    start_cluster: StartCluster, tokenizer_path: Path
) -> None:
    cluster = await fleet_of_none(start_cluster)
    cluster.launcher.failures = [ModelLoadError("tensor lm_head.weight is missing")]
    with pytest.raises(ModelLoadError, match="lm_head"):
        await roll_out(cluster, tokenizer_path, "2")
    assert version_of(await read(await generate(cluster))) == ""


async def test_another_tokenizer_or_the_same_version_is_refused(
    start_cluster: StartCluster, tokenizer_path: Path, tmp_path: Path
) -> None:
    cluster = await start_cluster(launcher=launcher_of())
    with pytest.raises(ConfigError, match="the version '' is served already"):
        await roll_out(cluster, tokenizer_path, "")
    other = shutil.copytree(tokenizer_path, tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace("<end>", "<END>"))
    with pytest.raises(ConfigError, match=r"its tokenizer\.json differ"):
        await roll_out(cluster, other, "2")
    assert len(cluster.launcher.launched) == 1


async def test_a_successor_serves_the_version_that_it_finds(start_cluster: StartCluster, tokenizer_path: Path) -> None:
    launcher = launcher_of()
    first = await start_cluster(launcher=launcher)
    model = first.controller._fleet.model
    living = LocalWorker(
        epoch=7,
        identities=[launcher.authority.issue("replica-0.7.0")],
        limits=launcher.limits,
        engine_options=NEW["2"],
        model=ModelConfig(model="/new", model_version="2"),
    )
    launcher.living = {"replica-0": living}
    second = await start_cluster(launcher=launcher)
    assert version_of(await read(await generate(second))) == "2"
    assert (second.controller._fleet.model.model, second.controller._fleet.model.name) == ("/new", model.name)
    await living.kill()
    await eventually(lambda: launcher.launched[-1].info.model_version == "2")
