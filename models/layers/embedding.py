"""Token embedding and language-model head, sharing one weight where the model ties them.

Ranks share both by vocabulary. What a rank does not have of the embedding is zeros, and one sum over the ranks a step makes it
whole.

T tokens, H hidden, V vocabulary of this rank, R rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

import torch

from ...kernels.embedding import embedding
from ...kernels.head_race import race_head
from ...kernels.linear import linear
from ...kernels.race import HeadScores, RaceRows
from ..weight_source import Placement, WeightSource

EMBEDDING_NAME = "model.embed_tokens.weight"
HEAD_NAME = "lm_head.weight"


class Embedding(torch.nn.Module):
    """Both ends of the model.

    Args:
        checkpoint_names: a tied checkpoint may hold its weight under either name.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, *, tied: bool, checkpoint_names: Set[str], placement: Placement
    ) -> None:
        super().__init__()
        self.vocab = placement.parallel.vocab_share(vocab_size)
        self.compute_dtype = placement.compute_dtype
        self.parallel = placement.parallel
        self.is_tied = tied
        self.names = [EMBEDDING_NAME, HEAD_NAME]
        if tied:
            self.names = [name for name in self.names if name in checkpoint_names] or [EMBEDDING_NAME]
        self.weight = placement.matrix(self.vocab.size, hidden_size)
        self.head_weight = self.weight if tied else placement.matrix(self.vocab.size, hidden_size)

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """x [T, H] of the compute dtype, whole on every rank."""
        own_TH = embedding(token_ids_T, self.weight, dtype=self.compute_dtype, first_id=self.vocab.start)
        return self.parallel.sum(own_TH)

    def own_logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """float32 [R, V]."""
        return linear(hidden_RH, self.head_weight, out_dtype=torch.float32)

    def race(self, hidden_RH: torch.Tensor, rows: RaceRows) -> HeadScores:
        """The same, of rows that want it; of others the best scores, where that is faster."""
        return race_head(hidden_RH, self.head_weight, rows, first_token=self.vocab.start)

    def gather_logits(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """float32 [R, whole vocabulary], on every rank."""
        return self.parallel.gather_vocab(logits_RV, self.vocab.total)

    def weight_sources(self) -> Iterator[WeightSource]:
        """Where a tied checkpoint repeats the weight as lm_head, it must be the same one."""
        for index, name in enumerate(self.names):
            yield WeightSource(
                name=name,
                shape=(self.vocab.total, self.weight.shape[1]),
                region=(self.vocab.range, slice(None)),
                target=self.head_weight if name == HEAD_NAME else self.weight,
                must_equal=self.is_tied and index > 0,
            )
