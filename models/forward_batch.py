"""What one forward pass reads: the tokens of every row, and where their keys and values live in the paged cache.

Rows are laid one after another: row s has the tokens query_starts[s] to query_starts[s + 1]. Prefill, chunked prefill and
decode rows look the same and mix freely. A batch may carry padding behind its last row: slot -1 stores nothing.

T tokens of the batch, S sequences (rows), B blocks of the widest row, L page length, R rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardBatch:
    """All tensors lie on the model's device; the arrays are not copied, so a CUDA graph may reuse them.

    Attributes:
        token_ids_T: int64.
        positions_T: int64, each token's place in its sequence.
        slots_T: int64, block_id * L + offset where the token's key and value go; -1 for padding.
        block_tables_SB: int32, each row's cache blocks in order; entries behind a row's last block are not read.
        query_starts_S1: int32 [S + 1].
        context_lens_S: int32, keys a row sees, its own new tokens included.
        max_query_len: at least the most new tokens in one row.
        min_query_len: at most the fewest new tokens in one row.
        logits_rows_R: int64, indices into T; None is every token.
        kv_caches: a layer's (keys, values), each [num_blocks, L, kv heads of this rank, head_dim]. With latent attention both
            are the same tensor.
        rank_tokens: T on each data rank, where there are several (parallel.py).
        is_padding_T: with several data ranks: bool, where a CUDA graph may be captured, so that nothing may wait for the
        device.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    block_tables_SB: torch.Tensor
    query_starts_S1: torch.Tensor
    context_lens_S: torch.Tensor
    max_query_len: int
    min_query_len: int
    logits_rows_R: torch.Tensor | None
    kv_caches: Sequence[tuple[torch.Tensor, torch.Tensor]]
    rank_tokens: tuple[int, ...] = ()
    is_padding_T: torch.Tensor | None = None

    def halves(self) -> tuple[ForwardBatch, ForwardBatch]:
        """The first tokens and the others, of one data rank; their rows are all rows, some of them without tokens.

        A row across the border is in both, so in every layer the first half must have stored its keys before the second
        attends. Made on the device alone. `logits_rows_R` are left out.
        """
        middle = len(self.token_ids_T) // 2
        first_S1, second_S1 = self.query_starts_S1.clamp(max=middle), (self.query_starts_S1 - middle).clamp(min=0)
        first = self._part(slice(middle), first_S1, self.context_lens_S - second_S1.diff())
        return first, self._part(slice(middle, None), second_S1, self.context_lens_S)

    def _part(self, tokens: slice, query_starts_S1: torch.Tensor, context_lens_S: torch.Tensor) -> ForwardBatch:
        token_ids_T = self.token_ids_T[tokens]
        return replace(
            self,
            token_ids_T=token_ids_T,
            positions_T=self.positions_T[tokens],
            slots_T=self.slots_T[tokens],
            query_starts_S1=query_starts_S1,
            context_lens_S=context_lens_S,
            max_query_len=min(self.max_query_len, len(token_ids_T)),
            min_query_len=0,
            logits_rows_R=None,
        )
