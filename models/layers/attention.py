"""Self-attention over the paged cache: packed q, k, v, their norm, rotary and store, attend, project.

T tokens, H hidden, N query heads, K kv heads, D head_dim (heads are this rank's).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...kernels.attend import prepare_and_attend
from ..forward_batch import ForwardBatch
from ..model_shape import ModelShape
from ..parallel import Share
from ..weight_source import Placement, WeightSource
from .linear import column_linear, row_linear
from .norm import RmsNorm
from .rotary import RotaryTable


class Attention(torch.nn.Module):
    """Layer `layer` of the model; ranks share the heads, perhaps unevenly."""

    def __init__(self, shape: ModelShape, layer: int, *, rotary: RotaryTable, placement: Placement) -> None:
        super().__init__()
        parallel, head_dim = placement.parallel, shape.head_dim
        q_rows = parallel.query_head_share(shape.num_heads, shape.num_kv_heads, unit=head_dim)
        kv_rows = parallel.kv_head_share(shape.num_kv_heads, unit=head_dim)
        self.layer = layer
        self.rotary = rotary
        self.head_dim = head_dim
        self.num_heads, self.num_kv_heads = q_rows.size // head_dim, kv_rows.size // head_dim
        self.window = shape.windows[layer]
        self.soft_cap = shape.attention_soft_cap
        self.norm_eps = shape.norm_eps
        self.qkv_proj = column_linear(
            {"q_proj": q_rows, "k_proj": kv_rows, "v_proj": kv_rows},
            shape.hidden_size,
            bias=shape.qkv_bias,
            placement=placement,
        )
        self.o_proj = row_linear("o_proj", shape.hidden_size, q_rows, bias=shape.output_bias, placement=placement)
        self.heads = Share(q_rows.start // head_dim, q_rows.stop // head_dim, shape.num_heads)
        self.sinks = placement.vector(self.heads.size) if shape.sinks else None
        self.q_norm = self.k_norm = None
        if shape.qk_norm:
            self.q_norm = RmsNorm("q_norm", head_dim, eps=shape.norm_eps, placement=placement)
            self.k_norm = RmsNorm("k_norm", head_dim, eps=shape.norm_eps, placement=placement)

    def forward(self, x_TH: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """What this rank adds to the sum over ranks."""
        return self.o_proj.forward(self.attend(self.qkv_proj.forward(x_TH), batch))

    def attend(self, qkv_TX: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """[T, N * D] from what `qkv_proj` answers."""
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        q_TND, k_TKD, v_TKD = qkv_TX.view(len(qkv_TX), sum(heads), self.head_dim).split_with_sizes(heads, dim=1)
        k_cache, v_cache = batch.kv_caches[self.layer]
        out_TND = prepare_and_attend(
            q_TND,
            k_TKD,
            v_TKD,
            self.rotary.cos_PC,
            self.rotary.sin_PC,
            batch.positions_T,
            k_cache,
            v_cache,
            batch.slots_T,
            batch.block_tables_SB,
            batch.query_starts_S1,
            batch.context_lens_S,
            max_query_len=batch.max_query_len,
            min_query_len=batch.min_query_len,
            q_norm_D=None if self.q_norm is None else self.q_norm.weight,
            k_norm_D=None if self.k_norm is None else self.k_norm.weight,
            norm_eps=self.norm_eps,
            scale=self.head_dim**-0.5,
            window=self.window,
            soft_cap=self.soft_cap,
            sinks_N=self.sinks,
        )
        return out_TND.view(len(qkv_TX), -1)

    def weight_sources(self, prefix: str) -> Iterator[WeightSource]:
        for part in (self.qkv_proj, self.o_proj, self.q_norm, self.k_norm):
            if part is not None:
                yield from part.weight_sources(prefix)
        if self.sinks is not None:
            heads = self.heads
            yield WeightSource(name=f"{prefix}sinks", shape=(heads.total,), region=(heads.range,), target=self.sinks)
