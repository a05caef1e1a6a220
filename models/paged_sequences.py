"""Runs sequences of token ids through a model's paged cache by hand, without a scheduler: for proofs and tests.

Blocks are handed out in a shuffled order, so that a wrong block table cannot go unnoticed. Data ranks, where there are several,
must extend by the same number of tokens at the same time.

T tokens of the batch, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import torch

from .causal_lm import CausalLM
from .forward_batch import ForwardBatch


class PagedSequences:
    """A cache of its own for `num_sequences` sequences of at most `max_len` tokens."""

    def __init__(self, model: CausalLM, *, num_sequences: int, max_len: int, block_size: int = 16, seed: int = 0) -> None:
        self.model = model
        self.block_size = block_size
        self.lengths = [0] * num_sequences
        blocks_each = -(-max_len // block_size)
        block_ids = list(range(1, num_sequences * blocks_each + 1))  # block 0 belongs to nobody
        random.Random(seed).shuffle(block_ids)
        self.block_tables = [block_ids[i * blocks_each : (i + 1) * blocks_each] for i in range(num_sequences)]
        shape = (len(block_ids) + 1, block_size, model.num_kv_heads, model.config.head_dim)

        def empty() -> torch.Tensor:
            """Not a number: what reads a place that nobody wrote shows at once."""
            return torch.full(shape, torch.nan, dtype=model.dtype, device=model.device)

        keys = [empty() for _ in range(model.config.num_layers)]
        self.kv_caches = [(layer, layer if model.config.latent else empty()) for layer in keys]

    @torch.inference_mode()
    def extend(self, new_tokens: Mapping[int, Sequence[int]]) -> dict[int, torch.Tensor]:
        """One forward pass that appends tokens to some of the sequences: the logits [new tokens, V] of each."""
        logits_TV = self.model.compute_logits(self.append(new_tokens)).cpu()
        return dict(zip(new_tokens, logits_TV.split([len(tokens) for tokens in new_tokens.values()]), strict=True))

    @torch.inference_mode()
    def append(self, new_tokens: Mapping[int, Sequence[int]]) -> torch.Tensor:
        """As `extend`, but stops at the hidden states [T, H] behind the final norm."""
        hidden_TH: torch.Tensor = self.model(self._batch(new_tokens))
        for sequence, tokens in new_tokens.items():
            self.lengths[sequence] += len(tokens)
        return hidden_TH

    def _batch(self, new_tokens: Mapping[int, Sequence[int]]) -> ForwardBatch:
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, context_lens = [0], []
        for sequence, tokens in new_tokens.items():
            start, blocks = self.lengths[sequence], self.block_tables[sequence]
            token_ids.extend(tokens)
            positions.extend(range(start, start + len(tokens)))
            slots.extend(
                blocks[position // self.block_size] * self.block_size + position % self.block_size
                for position in range(start, start + len(tokens))
            )
            starts.append(len(token_ids))
            context_lens.append(start + len(tokens))

        def tensor(values: Sequence[object], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self.model.device)

        return ForwardBatch(
            token_ids_T=tensor(token_ids, torch.int64),
            positions_T=tensor(positions, torch.int64),
            slots_T=tensor(slots, torch.int64),
            block_tables_SB=tensor([self.block_tables[sequence] for sequence in new_tokens], torch.int32),
            query_starts_S1=tensor(starts, torch.int32),
            context_lens_S=tensor(context_lens, torch.int32),
            max_query_len=max(len(tokens) for tokens in new_tokens.values()),
            min_query_len=min(len(tokens) for tokens in new_tokens.values()),
            logits_rows_R=torch.arange(len(token_ids), device=self.model.device),
            kv_caches=self.kv_caches,
            rank_tokens=(len(token_ids),) * (self.model.data.size if self.model.data is not None else 0),
        )
