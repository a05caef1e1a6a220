"""Movers of several ranks, each on a thread with a group of its own: after any orders the weights are where the map says."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from family_checkpoints import save_checkpoint
from pilotfish.models.build import load_model
from pilotfish.models.layers.moe import SparseMlp
from pilotfish.models.parallel import whole
from pilotfish.scheduler.expert_writes import next_writes
from pilotfish.scheduler.step_plan import ExpertOrders
from pilotfish.workers.comm import RankGroup, Rendezvous
from pilotfish.workers.expert_mover import ExpertMover
from rank_process import places

NUM_EXPERTS, NUM_STEPS, NUM_TOKENS, TOP_K = 8, 40, 5, 2


def on_ranks(size: int, num_redundant: int, work: Callable[[RankGroup], int]) -> list[int]:
    rendezvous = Rendezvous(host="127.0.0.1", timeout_s=30)
    options = {"whole_experts": True, "num_redundant_experts": num_redundant, "rebalance_interval_steps": 1}
    with ThreadPoolExecutor(size) as pool:
        ranks = places(size, rendezvous.address, **options)
        return list(pool.map(lambda place: work(RankGroup.join(place, torch.device("cpu"))), ranks))


def random_slots(rng: random.Random, num_slots: int) -> list[int]:
    slots = [*range(NUM_EXPERTS), *(rng.randrange(NUM_EXPERTS) for _ in range(num_slots - NUM_EXPERTS))]
    rng.shuffle(slots)
    return slots


def check_weights(layer: SparseMlp, still: SparseMlp) -> None:
    """`still` has expert e in slot e."""
    for slot, expert in enumerate(layer.map.experts_in(layer.slots)):
        for weights, of_all in zip(layer.experts.of_slots, still.experts.of_slots, strict=True):
            assert torch.equal(weights[slot], of_all[expert])


@torch.inference_mode()
def move_about(path: Path, group: RankGroup) -> int:
    """Random orders, a layer a step, each on its way to a target of its own. How many experts were moved."""
    rng, num_moved, num_counted = random.Random(5), 0, 0
    model, still = load_model(path, device="cpu", parallel=group.parallel), load_model(path, device="cpu")
    mover = ExpertMover(model, group)
    layers = [layer.mlp for layer in model.decoder_layers]
    addresses = [layer.map.copies_EN.data_ptr() for layer in layers]
    for step in range(NUM_STEPS):
        number = rng.randrange(len(layers))
        layer = layers[number]
        now = layer.map.experts_in(whole(layer.map.num_slots))
        limit = min(mover.writes_per_step, rng.choice((2, 3, 100)))
        writes = next_writes(now, random_slots(rng, len(now)), slots_per_rank=layer.slots.size, limit=limit)
        loads = mover.follow(ExpertOrders(step % 4 == 3, number, writes))
        if step % 4 == 3:
            num_counted += int(loads.sum())
            assert num_counted == step * NUM_TOKENS * TOP_K * group.place.size
        num_moved += len(writes)
        check_weights(layer, still.decoder_layers[number].mlp)
        x_TH = torch.randn(NUM_TOKENS, 64, generator=torch.Generator().manual_seed(step))
        expected = still.decoder_layers[number].mlp.forward(x_TH)
        found = group.parallel.sum(layer.forward(x_TH.clone()))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [layer.map.copies_EN.data_ptr() for layer in layers] == addresses
    return num_moved


@pytest.mark.parametrize(("size", "num_redundant"), [(2, 0), (2, 4), (4, 8), (3, 1)])
def test_weights_are_where_the_maps_say(tiny_mixtral: Path, size: int, num_redundant: int) -> None:
    ranks = on_ranks(size, num_redundant, partial(move_about, tiny_mixtral))
    assert ranks[0] > 2 * NUM_STEPS
    assert set(ranks) == {ranks[0]}


def test_biases_move_with_the_weights(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_local_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K}
    save_checkpoint(tmp_path, "GptOssForCausalLM", **sizes)
    assert on_ranks(2, 4, partial(move_about, tmp_path))[0] > 2 * NUM_STEPS
