"""The numbers a step scheduler is made with."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Sizes of one engine; block_size and the limits are explained in `common.config.EngineConfig`.

    Attributes:
        num_blocks: KV blocks to hand out (the padding page not counted).
        max_model_len: most tokens in one sequence, prompt and output.
        priority_aging_steps: one step of priority is worth having arrived this many engine steps earlier.
    """

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    prefix_caching: bool = True
    priority_aging_steps: int = 1024

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_num_seqs", "max_model_len", "priority_aging_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs ({self.max_num_seqs}): "
                "every running sequence has a token in every step"
            )
