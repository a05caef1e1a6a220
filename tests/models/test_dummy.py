"""Models with random weights: the named shapes are those of the published checkpoints, and the weights are fit to run."""

from __future__ import annotations

import pytest
import torch
from pilotfish.common.errors import ModelNotFound
from pilotfish.models.dummy import build_dummy
from pilotfish.models.dummy_shapes import SHAPES, dummy_shape
from pilotfish.models.layers.moe import SparseMlp
from pilotfish.models.paged_sequences import PagedSequences
from pilotfish.models.parallel import Parallel
from pilotfish.models.registry import lookup
from pilotfish.models.store import resolve


@pytest.mark.parametrize(
    ("name", "millions"),
    # as their model cards count
    [("qwen3-0.6b", 596.05), ("qwen3-8b", 8190.74), ("qwen3-30b-a3b", 30532.12), ("gpt-oss-20b", 20914.76)],
)
def test_a_named_shape_has_the_published_number_of_parameters(name: str, millions: float, monkeypatch) -> None:
    from pilotfish.models.causal_lm import CausalLM
    from pilotfish.models.weight_source import Placement

    placement = Placement(
        device=torch.device("meta"), weight_dtype=torch.bfloat16, compute_dtype=torch.bfloat16, parallel=Parallel()
    )
    shape = SHAPES[name]
    model = CausalLM(shape, lookup(shape.architecture), checkpoint_names=frozenset(), placement=placement)
    assert model.num_parameters / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("name", ["dummy:tiny", "dummy:tiny-moe"])
def test_a_dummy_computes_logits_of_a_sensible_size_and_its_seed_decides_them(name: str) -> None:
    def logits(seed: int) -> torch.Tensor:
        sequences = PagedSequences(build_dummy(name, device="cpu", seed=seed), num_sequences=1, max_len=16)
        return sequences.extend({0: [3, 1, 4, 1, 5]})[0]

    first, again, other = logits(0), logits(0), logits(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0.05 < float(first.std()) < 5
    assert len(set(first.argmax(dim=-1).tolist())) > 1


@pytest.mark.parametrize("name", ["dummy:tiny", "dummy:tiny-moe"])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_have_the_slices_of_one_model(name: str, size: int) -> None:
    def no_collective(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("weights need none")

    whole = {source.name: source.target for source in build_dummy(name, device="cpu", seed=1).weight_sources()}
    for rank in range(size):
        parallel = Parallel(rank=rank, size=size, all_reduce=no_collective, all_gather=no_collective)
        for source in build_dummy(name, device="cpu", seed=1, parallel=parallel).weight_sources():
            assert torch.equal(source.target, whole[source.name][source.region]), source.name


def test_tokens_spread_over_the_experts_and_every_layer_chooses_for_itself() -> None:
    model = build_dummy("dummy:tiny-moe", device="cpu")
    chosen: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, SparseMlp):
            module.register_forward_hook(
                lambda mlp, inputs, _: chosen.append(mlp.router(inputs[0]).topk(mlp.moe.top_k).indices.sort().values)
            )
    PagedSequences(model, num_sequences=1, max_len=256).extend({0: list(range(256))})
    assert len(chosen) == 2
    for experts_TC in chosen:
        shares = experts_TC.flatten().bincount(minlength=8) / experts_TC.numel()
        assert shares.min() > 0.03  # an even spread is 1/8
        assert shares.max() < 0.3
    assert (chosen[0] != chosen[1]).any(dim=1).float().mean() > 0.5


def test_an_unknown_shape_is_answered_with_the_near_one() -> None:
    with pytest.raises(ModelNotFound, match=r"did you mean 'qwen3-8b'\?.*tiny-moe"):
        dummy_shape("dummy:qwen3-8")


def test_a_dummy_is_not_a_model_that_can_be_served() -> None:
    with pytest.raises(ModelNotFound, match=r"no tokenizer.*pilotfish bench latency"):
        resolve("dummy:tiny")
