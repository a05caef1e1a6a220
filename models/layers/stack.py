"""The decoder layers one after another: the whole batch at once, or in halves that hide the sums over ranks.

With tensor ranks every layer ends twice in a sum over ranks. In a large step such a sum takes a sixth of what comes before it,
and nothing else in the layer can go on meanwhile. Of two halves of the tokens one can: while the sum of one is under way the
other is computed, by turns, after the attention and after the MLP. The idea is that of "two-batch overlap" (DeepSeek-AI 2024,
"DeepSeek-V3", section 3.4), for sums instead of the dispatch of experts.

Behind the last attention only tokens count whose logits are wanted, of a prompt its last: all others leave the step there.

T tokens, R those whose logits are wanted (all, if the batch names none), H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...kernels.expert_terms import Summands, sum_terms
from ..forward_batch import ForwardBatch
from ..parallel import Addend, Parallel, StartedSum
from .decoder import DecoderLayer
from .moe import SparseMlp

Stream = tuple[Addend, torch.Tensor]  # this rank's addend and the residual, [T, H] each


def run_layers(layers: Sequence[DecoderLayer], x_TH: torch.Tensor, batch: ForwardBatch, parallel: Parallel) -> Stream:
    """What the last layer answers, [R, H], for x whole on each rank."""
    if _halves_pay(layers, x_TH, parallel):
        return _run_in_halves(layers, x_TH, batch, parallel)
    addend: Addend = x_TH
    residual_TH: torch.Tensor | None = None
    *others, last = layers
    for layer in others:
        addend, residual_TH = layer.attend(addend, residual_TH, batch)
        addend, residual_TH = layer.feed_forward(addend, residual_TH)
    if parallel.data is None:
        return last.feed_forward(*last.attend(addend, residual_TH, batch, batch.logits_rows_R))
    # Data ranks have told each other how many tokens go to the experts.
    return select_rows(last.feed_forward(*last.attend(addend, residual_TH, batch)), batch.logits_rows_R)


def select_rows(stream: tuple[Summands, torch.Tensor], rows_R: torch.Tensor | None) -> tuple[Summands, torch.Tensor]:
    """Those of the tokens `rows_R`, or all."""
    if rows_R is None:
        return stream
    addend, residual_TH = stream
    return sum_terms(addend).index_select(0, rows_R), residual_TH.index_select(0, rows_R)


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
    *others, last = layers
    for layer in others:
        for half in halves:
            addend, half.residual = layer.attend(half.addend, half.residual, half.batch)
            half.addend = _start_sum(addend, parallel)
        for half in halves:
            addend, half.residual = layer.feed_forward(half.addend, half.residual)
            half.addend = _start_sum(addend, parallel)
    for half in halves:
        half.addend, half.residual = last.attend(half.addend, half.residual, half.batch)
    stream = _join([half.addend for half in halves]), _join([half.residual for half in halves])
    return last.feed_forward(*select_rows(stream, batch.logits_rows_R))


def _start_sum(addend: Addend, parallel: Parallel) -> StartedSum:
    assert parallel.start_sum is not None
    return parallel.start_sum(_summed(addend))


def _join(halves: Sequence[Addend | None]) -> torch.Tensor:
    return torch.cat([_summed(half) for half in halves])


def _summed(addend: Addend | None) -> torch.Tensor:
    assert addend is not None
    assert not isinstance(addend, StartedSum)
    return sum_terms(addend)
