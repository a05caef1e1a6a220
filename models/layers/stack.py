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

from ..forward_batch import ForwardBatch
from ..parallel import Addend, Parallel
from .decoder import DecoderLayer
from .mlp import Mlp

Stream = tuple[Addend, torch.Tensor]  # this rank's addend and the residual, [T, H] each


def run_layers(layers: Sequence[DecoderLayer], x_TH: torch.Tensor, batch: ForwardBatch, parallel: Parallel) -> Stream:
    """What the last layer answers, for x whole on each rank."""
    if _pays(layers, x_TH, parallel):
        return _run_in_halves(layers, x_TH, batch, parallel)
    addend: Addend = x_TH
    residual_TH: torch.Tensor | None = None
    for layer in layers:
        addend, residual_TH = layer.attend(addend, residual_TH, batch)
        addend, residual_TH = layer.feed_forward(addend, residual_TH)
    assert residual_TH is not None  # a model has layers
    return addend, residual_TH


def _pays(layers: Sequence[DecoderLayer], x_TH: torch.Tensor, parallel: Parallel) -> bool:
    """It follows from the number of tokens alone, so that all ranks choose alike.

    Not of sparse layers: experts take much longer than half for half of the tokens.
    """
    if parallel.start_sum is None or len(x_TH) < 2 or not all(isinstance(layer.mlp, Mlp) for layer in layers):
        return False
    return x_TH.nbytes // 2 >= parallel.min_started_bytes


@dataclass(slots=True)
class _Half:
    batch: ForwardBatch
    addend: Addend
    residual: torch.Tensor | None = None


def _run_in_halves(layers: Sequence[DecoderLayer], x_TH: torch.Tensor, batch: ForwardBatch, parallel: Parallel) -> Stream:
    assert parallel.start_sum is not None
    batches = batch.halves()
    addends = x_TH.split([len(half.token_ids_T) for half in batches])
    halves = [_Half(half, addend) for half, addend in zip(batches, addends, strict=True)]
    for layer in layers:
        for half in halves:
            addend, half.residual = layer.attend(half.addend, half.residual, half.batch)
            half.addend = parallel.start_sum(addend)
        for half in halves:
            addend, half.residual = layer.feed_forward(half.addend, half.residual)
            # What the last layer adds is left to the final norm, which sums the few rows that it wants.
            half.addend = addend if layer is layers[-1] else parallel.start_sum(addend)
    return _join([half.addend for half in halves]), _join([half.residual for half in halves])


def _join(halves: Sequence[Addend | None]) -> torch.Tensor:
    tensors = [half for half in halves if isinstance(half, torch.Tensor)]
    assert len(tensors) == len(halves)
    return torch.cat(tensors)
