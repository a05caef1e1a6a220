"""A model whose layers are chained gives what it gives layer by layer; and which models are."""

from __future__ import annotations

import random

import pytest
import torch
from pilotfish.kernels import between_attentions
from pilotfish.kernels.expert_terms import sum_terms
from pilotfish.models.dummy import build_dummy
from pilotfish.models.layers import chain as module
from pilotfish.models.layers.chain import LayerChain, build_chain
from pilotfish.models.paged_sequences import PagedSequences
from pilotfish.models.parallel import Parallel


@pytest.mark.parametrize("name", ["dummy:tiny", "dummy:tiny-moe"])
def test_a_chain_equals_layer_by_layer(monkeypatch, name: str) -> None:
    """The kernel's place is taken by the ops that it joins."""

    def run(attended_TQ, residual_TH, layer, following, *, counter, config):
        assert counter is chained.chain._counter
        y, residual = between_attentions.separate_layer(attended_TQ, residual_TH, layer, following)
        return sum_terms(y), residual

    monkeypatch.setattr(module, "fused_layer", run)
    monkeypatch.setattr(module, "choose_config", lambda layer, following, num_rows: {} if num_rows <= 8 else None)
    monkeypatch.setattr(module, "unfit_reason", lambda *args: None)
    whole, chained = (build_dummy(name, device="cpu", dtype="float32") for _ in range(2))
    chained.chain = LayerChain(chained.decoder_layers, chained.device)
    sequences = [PagedSequences(model, num_sequences=4, max_len=64) for model in (whole, chained)]
    tokens = random.Random(5)
    for lengths in ({0: 20, 1: 3}, {0: 1, 1: 1, 2: 5}, {0: 1, 2: 1}, {3: 8}, {3: 1}):
        new = {row: tokens.choices(range(100), k=length) for row, length in lengths.items()}
        expected, actual = (paged.append(new) for paged in sequences)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_no_chain_on_a_cpu_nor_of_several_ranks() -> None:
    model = build_dummy("dummy:tiny", device="cpu", dtype="float32")
    assert model.chain is None
    cuda = torch.device("cuda", 0)
    assert build_chain(model.decoder_layers[:1], Parallel(), cuda) is None
    ranks = Parallel(size=2, all_reduce=lambda x: x, all_gather=lambda x: x)
    assert build_chain(model.decoder_layers, ranks, cuda) is None
    model.decoder_layers[1].mlp.down_proj.bias = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    assert build_chain(model.decoder_layers, Parallel(), cuda) is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dummy:qwen3-0.6b", "dummy:qwen3-30b-a3b"])
def test_on_a_gpu_a_chain_differs_by_roundings_alone(monkeypatch, name: str) -> None:
    """Half the tokens by no more: two ways to add may choose other experts of nearly equal logits for some."""
    config = {"kernel": "fused", "max_in_flight": 3, "prefetches": 0}
    monkeypatch.setattr(module, "choose_config", lambda layer, following, num_rows: config if num_rows <= 8 else None)
    model = build_dummy(name, device="cuda", dtype="bfloat16")
    chain = model.chain
    assert chain is not None
    assert chain.serves(1)
    assert not chain.serves(9)
    outputs = []
    for model.chain in (chain, None):
        paged, tokens = PagedSequences(model, num_sequences=4, max_len=64), random.Random(5)
        steps = ({0: 20, 1: 3, 2: 30, 3: 5}, {0: 1}, {0: 1, 2: 1}, {1: 1, 2: 2, 3: 1}, {0: 1, 1: 5, 2: 1, 3: 1})
        news = ({row: tokens.choices(range(1000), k=length) for row, length in lengths.items()} for lengths in steps)
        outputs.append([paged.append(new).float() for new in news][1:])
    for actual, expected in zip(*outputs, strict=True):
        errors_T = (actual - expected).norm(dim=1) / expected.norm(dim=1)
        assert errors_T.median() < 5e-2, errors_T
