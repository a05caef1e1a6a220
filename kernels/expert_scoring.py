"""How expert_choice.py scores experts, as data (without torch, for those who only describe a model)."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertScoring:
    """How logits become ranks and weights; the defaults are those of a plain router."""

    function: Literal["softmax", "sigmoid"]
    num_groups: int = 1
    num_chosen_groups: int = 1
    group_top: int = 1
    scale: float = 1.0

    @property
    def is_plain(self) -> bool:
        """Whether, without a correction, route_tokens does the same."""
        return self.function == "softmax" and self.num_chosen_groups == self.num_groups and self.scale == 1.0

    def problem(self, num_experts: int, top_k: int) -> str | None:
        """Why so many experts cannot be chosen so, or None."""
        size, rest = divmod(num_experts, self.num_groups)
        if rest:
            return f"{num_experts} experts do not divide into {self.num_groups} groups"
        if not 1 <= self.num_chosen_groups <= self.num_groups:
            return f"{self.num_chosen_groups} of {self.num_groups} groups cannot be chosen"
        if not 1 <= self.group_top <= size:
            return f"groups of {size} experts cannot be ranked by {self.group_top} of them"
        if not 1 <= top_k <= self.num_chosen_groups * size:
            return f"{top_k} experts cannot be chosen from {self.num_chosen_groups} groups of {size}"
        return None
