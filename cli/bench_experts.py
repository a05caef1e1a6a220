"""How many experts a decode step touches: counted in sequences that an engine has generated, apart from any timing."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch

from ..common.requests import WorkerInfo
from ..models.build import DtypeName, load_model
from ..models.causal_lm import CausalLM
from ..models.dummy import build_dummy
from ..models.dummy_shapes import is_dummy
from ..models.layers.moe import SparseMlp
from ..models.paged_sequences import PagedSequences


def count_experts(info: WorkerInfo, batches: Sequence[Sequence[tuple[int, ...]]]) -> list[float]:
    """For each batch of sequences, the distinct experts of the step that reads its last tokens, as the mean over sparse layers.

    Builds the model of `info` a second time, so the engine that had the first must be gone.
    """
    gc.collect()
    if info.device.startswith("cuda"):
        torch.cuda.empty_cache()
    build = build_dummy if is_dummy(info.model_path) else load_model
    model = build(info.model_path, device=info.device, dtype=cast(DtypeName, info.dtype))
    return [_count_in_last_step(model, batch) for batch in batches]


def _count_in_last_step(model: CausalLM, batch: Sequence[tuple[int, ...]]) -> float:
    paged = PagedSequences(model, num_sequences=len(batch), max_len=max(map(len, batch)))
    for number, tokens in enumerate(batch):
        paged.append({number: tokens[:-1]})
    counts: list[int] = []
    layers = [module for module in model.modules() if isinstance(module, SparseMlp)]
    hooks = [layer.register_forward_pre_hook(partial(_count, counts)) for layer in layers]
    paged.append({number: tokens[-1:] for number, tokens in enumerate(batch)})
    for hook in hooks:
        hook.remove()
    return statistics.mean(counts)


def _count(counts: list[int], layer: SparseMlp, inputs: tuple[torch.Tensor, ...]) -> None:
    _, experts_TC = layer.choose(inputs[0])
    counts.append(experts_TC.unique().numel())
