"""Replicas on Ray whose ranks have a GPU each: NCCL, memory in common, CUDA graphs. On CPUs: test_ray_replicas.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import ray
import tokenizers
import torch
from pilotfish import Pipeline, SamplingParams
from pilotfish.common.cluster_state import ReplicaState
from pilotfish.controller.deployment import deploy
from pilotfish.workers.actor import WorkerActor
from ray_serving import PROMPT, Reader, Served, all_ready, config, wait_until
from small_model import save_counting_llama
from upcycled import upcycle

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.gpu2,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]


LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel": 2},
    "experts": {"data_parallel": 2, "expert_parallel": True},
}
LONG = 1500  # tokens: a GPU makes two thousand of these models' in a second


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_text_is_that_of_a_cpu(local_ray: None, model_path: Path, tmp_path: Path, layout: str) -> None:
    """In float32, and when a rank is killed amid the stream."""
    model = upcycle(model_path, tmp_path / "sparse", num_experts=4) if layout == "experts" else model_path
    with Pipeline(str(model), device="cpu", num_kv_blocks=512, num_threads=1) as pipeline:
        expected = pipeline(PROMPT, SamplingParams(temperature=0, max_tokens=LONG, ignore_eos=True))
    with served_by_two(model, layout, dtype="float32") as served:
        assert Reader(served, max_tokens=LONG).finish().token_ids == list(expected.token_ids)
        (reader,) = lose_a_rank(served, [PROMPT])
        assert reader.finish().token_ids == list(expected.token_ids)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_streams_go_on_at_the_right_token(local_ray: None, tmp_path: Path, layout: str) -> None:
    """In bfloat16, of a model whose text no rounding changes."""
    model = save_counting_llama(tmp_path / "dense")
    if layout == "experts":
        model = upcycle(model, tmp_path / "sparse", num_experts=4)
    count = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")).encode
    prompts = [PROMPT[:length] for length in (4, 11, 20, 30)]
    with served_by_two(model, layout, dtype="bfloat16") as served:
        for prompt, reader in zip(prompts, lose_a_rank(served, prompts), strict=True):
            last = count(prompt).ids[-1]
            assert reader.finish().token_ids == [(last + 1 + place) % 257 for place in range(LONG)]


@contextmanager
def served_by_two(model: Path, layout: str, *, dtype: Literal["float32", "bfloat16"]) -> Iterator[Served]:
    """Two ranks of a GPU each. At the end of the block the replica has to be there again, and after it nothing."""
    ranks = config(model, num_replicas=1, device="cuda", **LAYOUTS[layout])
    ranks = replace(ranks, model=replace(ranks.model, dtype=dtype))
    deployment = deploy(ranks, model_path=str(model), worker_class=ray.remote(WorkerActor))
    try:
        served = Served(deployment, deployment.wait_ready(timeout_s=180))
        infos = [replica.info for replica in deployment.status().replicas]
        assert all((info.dtype, info.device[:4]) == (dtype, "cuda") for info in infos), infos
        yield served
        wait_until(lambda: all_ready(deployment, restarts=1), "the replica's successor", timeout_s=120)
    finally:
        deployment.shutdown()
    assert ray.util.list_named_actors() == []


def lose_a_rank(served: Served, prompts: Sequence[str]) -> list[Reader]:
    """Rank 1 is killed while all these streams run."""

    def is_down() -> bool:
        return any(replica.state is not ReplicaState.READY for replica in served.deployment.status().replicas)

    (doomed,) = [ray.get_actor(name) for name in ray.util.list_named_actors() if name.endswith(".1")]
    readers = [Reader(served, max_tokens=LONG, prompt=prompt) for prompt in prompts]
    for reader in readers:
        reader.wait_for(5)
    ray.kill(doomed)
    wait_until(is_down, "the loss to be seen")
    assert all(reader.is_alive() for reader in readers), "a stream had ended before the rank did"
    return readers
