"""The choice of experts by corrected, grouped or scaled scores, with the correction that a checkpoint may hold.

T tokens, E experts, C choices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...kernels.expert_choice import choose_experts
from ...kernels.expert_scoring import ExpertScoring
from ..model_shape import MoeShape
from ..weight_source import Placement, WeightSource


class ExpertChoice(torch.nn.Module):
    """Behind a router's logits, where softmax alone does not decide.

    Args:
        correction: name of the correction in the checkpoint, below the decoder layer; None where there is none.
    """

    def __init__(self, moe: MoeShape, scoring: ExpertScoring, *, correction: str | None, placement: Placement) -> None:
        super().__init__()
        self.moe, self.scoring, self.name = moe, scoring, correction
        # float32 on every device: ranks differ by less than a bfloat16 correction would round.
        self.correction = None if correction is None else placement.exact_vector(moe.num_experts)

    def choose(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights_TC, experts_TC)."""
        return choose_experts(
            logits_TE,
            self.moe.top_k,
            renormalize=self.moe.renormalize,
            scoring=self.scoring,
            correction_E=self.correction,
        )

    def weight_sources(self, prefix: str) -> Iterator[WeightSource]:
        if self.correction is not None:
            size = self.moe.num_experts
            yield WeightSource(name=f"{prefix}{self.name}", shape=(size,), region=(slice(size),), target=self.correction)
