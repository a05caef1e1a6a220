"""Multi-head latent attention (MLA) over a paged cache that holds one row a token, whatever the number of heads.

A token's row is its latent, from which every head's keys and values would be made, and behind it the numbers that all heads'
keys share and that turn with the position. Keys and values are never made: a head's query is put into the latent space (by the
transpose of what would make its keys), attends to the rows, and the attended latent goes through what would make values:

    q'  = (key_up.T @ q_still, rotary(q_turning))        score = scale * q' . row
    out = value_up @ (sum of weight * latent)

So there is one kv head, whose values are the first numbers of its keys. Source: DeepSeek-AI 2024, "DeepSeek-V2".

T tokens, N query heads of this rank, R numbers of the latent, B blocks, L page length, D numbers of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ...kernels.head_linear import head_linear
from ...kernels.paged_attention import paged_attention
from ...kernels.qkv_prepare import prepare_qkv
from ..forward_batch import ForwardBatch
from ..model_shape import LatentShape, ModelShape
from ..parallel import Share, whole
from ..weight_source import Placement, WeightSource
from .linear import column_linear, row_linear
from .norm import RmsNorm
from .rotary import RotaryTable

_LATENT_EPS = 1e-6  # of the latents' norms; the checkpoint's own is for the other norms
# A program of the attention kernels takes all query heads of a kv head: of more their sums would not fit in its registers.
_MAX_HEADS_A_PROGRAM = 16


class LatentAttention(torch.nn.Module):
    """Layer `layer` of the model; ranks share the query heads, and each keeps the whole cache."""

    num_kv_heads = 1

    def __init__(
        self, shape: ModelShape, latent: LatentShape, layer: int, *, rotary: RotaryTable, placement: Placement
    ) -> None:
        super().__init__()
        self.layer, self.latent, self.rotary = layer, latent, rotary
        self.q_rank = latent.q_rank or 0

        def heads(unit: int) -> Share:
            return placement.parallel.share(shape.num_heads, what="the number of attention heads", unit=unit)

        self.num_heads = heads(1).size
        key_dim = latent.still_dim + latent.turning_dim
        a_parts = {"q_a_proj": whole(self.q_rank)} if self.q_rank else {}
        a_parts["kv_a_proj_with_mqa"] = whole(latent.cached_dim)
        self.a_proj = column_linear(a_parts, shape.hidden_size, bias=shape.qkv_bias, placement=placement)
        self.q_norm = None
        if self.q_rank:
            self.q_norm = RmsNorm("q_a_layernorm", self.q_rank, eps=_LATENT_EPS, placement=placement)
        q_name, num_inputs = ("q_b_proj", self.q_rank) if self.q_rank else ("q_proj", shape.hidden_size)
        self.q_proj = column_linear({q_name: heads(key_dim)}, num_inputs, bias=False, placement=placement)
        self.latent_norm = RmsNorm("kv_a_layernorm", latent.kv_rank, eps=_LATENT_EPS, placement=placement)
        up_rows = heads(latent.still_dim + latent.value_dim)
        self.kv_up = column_linear({"kv_b_proj": up_rows}, latent.kv_rank, bias=False, placement=placement)
        self.o_proj = row_linear(
            "o_proj", shape.hidden_size, heads(latent.value_dim), bias=shape.output_bias, placement=placement
        )

    def forward(self, x_TH: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """What this rank adds to the sum over ranks."""
        latent, (num_tokens, _) = self.latent, x_TH.shape
        key_up_NSR, value_up_NVR = self.kv_up.weight.unflatten(0, (self.num_heads, -1)).split(
            (latent.still_dim, latent.value_dim), dim=1
        )
        q_TQ, latent_TR, k_turning = self.a_proj.forward(x_TH).split((self.q_rank, latent.kv_rank, latent.turning_dim), dim=1)
        q = self.q_proj.forward(x_TH if self.q_norm is None else self.q_norm.forward(q_TQ))
        q_still, q_turning = q.view(num_tokens, self.num_heads, -1).split((latent.still_dim, latent.turning_dim), dim=2)
        q_TND = torch.cat((head_linear(q_still, key_up_NSR.transpose(1, 2)), q_turning), dim=2)
        cache_BL1D, _ = batch.kv_caches[self.layer]
        prepare_qkv(
            q_TND[..., latent.kv_rank :],
            k_turning.unsqueeze(1),
            self.latent_norm.forward(latent_TR).unsqueeze(1),
            self.rotary.cos_PC,
            self.rotary.sin_PC,
            batch.positions_T,
            cache_BL1D[..., latent.kv_rank :],
            cache_BL1D[..., : latent.kv_rank],
            batch.slots_T,
            norm_eps=_LATENT_EPS,
        )
        out_TND = self._attend(q_TND, cache_BL1D, batch)
        out_TNV = head_linear(out_TND[..., : latent.kv_rank], value_up_NVR)
        return self.o_proj.forward(out_TNV.reshape(num_tokens, -1))

    def _attend(self, q_TND: torch.Tensor, cache_BL1D: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        """The cache stands for several kv heads that are all the same one, each with a part of the query heads."""
        fewest = -(-self.num_heads // _MAX_HEADS_A_PROGRAM)
        num_parts = next(n for n in range(fewest, self.num_heads + 1) if self.num_heads % n == 0)
        rows_BLKD = cache_BL1D.expand(-1, -1, num_parts, -1)
        return paged_attention(
            q_TND,
            rows_BLKD,
            rows_BLKD,
            batch.block_tables_SB,
            batch.query_starts_S1,
            batch.context_lens_S,
            max_query_len=batch.max_query_len,
            min_query_len=batch.min_query_len,
            scale=self.latent.scale,
        )

    def weight_sources(self, prefix: str) -> Iterator[WeightSource]:
        latent = self.latent
        for part in (self.a_proj, self.q_norm, self.q_proj, self.latent_norm, self.kv_up, self.o_proj):
            for source in [] if part is None else part.weight_sources(prefix):
                if part is self.q_proj:
                    yield from self._turning_rows_in_halves(source, latent.still_dim)
                elif source.name.startswith(f"{prefix}kv_a_proj_with_mqa."):
                    yield from self._turning_rows_in_halves(source, latent.kv_rank)
                else:
                    yield source

    def _turning_rows_in_halves(self, source: WeightSource, still_rows: int) -> Iterator[WeightSource]:
        """The source in parts, so that each head's turning rows, behind `still_rows`, lie as the kernels turn them.

        Checkpoints have the two rows that turn together side by side: 0 1 0 1 0 1. Kernels want 0 0 0 1 1 1.
        """
        if not self.latent.interleaved:
            yield source
            return
        turning_rows = self.latent.turning_dim
        for head in range(0, len(source.target), still_rows + turning_rows):
            turning = head + still_rows
            first, second = turning + turning_rows // 2, turning + turning_rows
            for rows, target in (
                (slice(head, turning), source.target[head:turning]),
                (slice(turning, second, 2), source.target[turning:first]),
                (slice(turning + 1, second, 2), source.target[first:second]),
            ):
                start = source.region[0].start
                region = slice(start + rows.start, start + rows.stop, rows.step)
                yield replace(source, region=(region, *source.region[1:]), target=target)
