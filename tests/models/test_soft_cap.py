"""A soft cap on attention scores, as the spec's setting and against transformers with a capped attention function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from pilotfish.models.build import load_model
from pilotfish.models.paged_sequences import PagedSequences
from transformers import AttentionInterface, PreTrainedModel

SOFT_CAP = 0.7


def capped_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *mask: object, **options: object
) -> tuple[torch.Tensor, None]:
    """One sequence without a cache: [1, heads, tokens, head_dim]."""
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * query.shape[-1] ** -0.5
    scores = SOFT_CAP * torch.tanh(scores / SOFT_CAP)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None


def test_soft_cap_reaches_the_scores(tmp_path: Path, save_checkpoint: Callable[..., PreTrainedModel]) -> None:
    untouched = save_checkpoint(tmp_path, "LlamaForCausalLM")
    model = load_model(tmp_path, device="cpu")
    tokens = list(range(20))

    def largest_difference() -> float:
        got = PagedSequences(model, num_sequences=1, max_len=32).extend({0: tokens})[0]
        return (got - want).abs().max().item()

    AttentionInterface.register("capped", capped_attention)
    untouched.set_attn_implementation("capped")
    with torch.inference_mode():
        want = untouched(torch.tensor([tokens]), use_cache=False).logits[0]
    assert largest_difference() > 0.01
    for layer in model.decoder_layers:
        layer.attention.soft_cap = SOFT_CAP
    assert largest_difference() < 1e-4
