"""A Ray cluster over three hosts on this machine, brought up with `ray up` and serving a tiny random Llama on two ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import host_network
import pytest
from host_network import SHARED, HostNetwork
from pilotfish import Pipeline, SamplingParams
from ray_hosts import PROMPT, RayHosts
from small_model import save_tiny_llama


@pytest.fixture(scope="session", autouse=True)
def possible_here() -> None:
    """Who types `make test-cluster` asked for them, and none of them run is not a pass; .ci/run takes what a machine can do."""
    if reason := host_network.why_not():
        if os.environ.get("PILOTFISH_TEST_HOSTS") == "if-possible":
            pytest.skip(reason)
        pytest.fail(reason, pytrace=False)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def expected(model_path: Path) -> tuple[str, list[int]]:
    """Text and tokens of one rank in this process, longer than any test's stream."""
    with Pipeline(str(model_path), device="cpu", num_kv_blocks=256, num_threads=1) as pipeline:
        done = pipeline(PROMPT, SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
    return done.text, list(done.token_ids)


@pytest.fixture(scope="module")
def cluster(possible_here: None, model_path: Path) -> Iterator[RayHosts]:
    with HostNetwork("head", "one", "two") as network:
        for file in model_path.iterdir():
            (network.shared / "tiny").mkdir(exist_ok=True)
            (network.shared / "tiny" / file.name).write_bytes(file.read_bytes())
        serve = (
            f"{SHARED}/tiny --served-name tiny --wait-nodes 3 --host 0.0.0.0 --device cpu --num-kv-blocks 512 --num-threads 1"
        )
        hosts = RayHosts(network, serve=f"{serve} --max-num-seqs 8 --tensor-parallel 2 --placement spread")
        print(hosts.up())
        yield hosts
