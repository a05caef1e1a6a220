"""The decoder layers one after another: the whole batch at once, or in halves that hide the sums over ranks.

With tensor ranks every layer ends twice in a sum over ranks. In a large step such a sum takes a sixth of what comes before it,
and nothing else in the layer can go on meanwhile. Of two halves of the tokens one can: while the sum of one is under way the
other is computed, by turns, after the attention and after the MLP. The idea is that of "two-batch overlap" (DeepSeek-AI 2024,
"DeepSeek-V3", section 3.4), for sums instead of the dispatch of experts.

T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...kernels.expert_terms import sum_terms
from ..forward_batch import ForwardBatch
from ..parallel import Addend, Parallel, StartedSum
from .decoder import DecoderLayer
from .moe import SparseMlp

Stream = tuple[Addend, torch.Tensor]  # this rank's addend and the residual, [T, H] each


def run_layers(layers: Sequence[DecoderLayer], x_TH: torch.Tensor, batch: ForwardBatch, parallel: Parallel) -> Stream:
    """What the last layer answers, for x whole on each rank."""
    if _halves_pay(layers, x_TH, parallel):
        return _run_in_halves(layers, x_TH, batch, parallel)
    addend: Addend = x_TH
    residual_TH: torch.Tensor | None = None
    for layer in layers:
        addend, residual_TH = layer.attend(addend, residual_TH, batch)
        addend, residual_TH = layer.feed_forward(addend, residual_TH)
    assert residual_TH is not None  # a model has layers
    return addend, residual_TH


def _halves_pay(layers: Sequence[DecoderLayer], x_TH: torch.Tensor, parallel: Parallel) -> bool:
    """It follows from the number of tokens alone, so that all ranks choose alike.

    Of sparse layers only large halves: of few tokens experts take much longer than half for half of them. Data ranks share
    experts, and keep their steps whole.
    """
    half_tokens = len(x_TH) // 2
    if parallel.start_sum is None or half_tokens == 0 or x_TH[:half_tokens].nbytes < parallel.min_started_bytes:
        return False
    if all(not isinstance(layer.mlp, SparseMlp) for layer in layers):
        return True
    return parallel.data is None and half_tokens >= parallel.min_sparse_half_tokens


@dataclass(slots=True)
class _Half:
    batch: ForwardBatch
    addend: Addend
    residual: torch.Tensor | None = None


def _run_in_halves(layers: Sequence[DecoderLayer], x_TH: torch.Tensor, batch: ForwardBatch, parallel: Parallel) -> Stream:
    batches = batch.halves()
    addends = x_TH.split([len(half.token_ids_T) for half in batches])
    halves = [_Half(half, addend) for half, addend in zip(batches, addends, strict=True)]
    for layer in layers:
        for half in halves:
            addend, half.residual = layer.attend(half.addend, half.residual, half.batch)
            half.addend = _start_sum(addend, parallel)
        for half in halves:
            addend, half.residual = layer.feed_forward(half.addend, half.residual)
            # What the last layer adds is left to the final norm, which sums the few rows that it wants.
            half.addend = addend if layer is layers[-1] else _start_sum(addend, parallel)
    return _join([half.addend for half in halves]), _join([half.residual for half in halves])


def _start_sum(addend: Addend, parallel: Parallel) -> StartedSum:
    assert parallel.start_sum is not None
    return parallel.start_sum(_summed(addend))


def _join(halves: Sequence[Addend | None]) -> torch.Tensor:
    return torch.cat([_summed(half) for half in halves])


def _summed(addend: Addend | None) -> torch.Tensor:
    assert addend is not None
    assert not isinstance(addend, StartedSum)
    return sum_terms(addend)
