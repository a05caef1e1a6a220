"""What a draw leaves of each row, and where its token goes: behind the tokens of its sequence, for the next step to read.

S rows, M slots, C tokens a slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class Drawn:
    """Drawn tokens and their logits. `bits`, int32 [3 S], are the tokens' and then the logits', which travel in one copy."""

    bits: torch.Tensor

    @staticmethod
    def empty(num_rows: int, device: torch.device) -> Drawn:
        return Drawn(torch.empty(3 * num_rows, dtype=torch.int32, device=device))

    @staticmethod
    def of(tokens_S: torch.Tensor, logits_S: torch.Tensor) -> Drawn:
        """int64 tokens and float32 logits, put together."""
        return Drawn(torch.cat((tokens_S.view(torch.int32), logits_S.view(torch.int32))))

    def left_in(self, out: Drawn | None) -> Drawn:
        """The same there, if there is such a place."""
        if out is None:
            return self
        out.bits.copy_(self.bits)
        return out

    @property
    def tokens_S(self) -> torch.Tensor:
        """int64."""
        return self.bits[: len(self.bits) // 3 * 2].view(torch.int64)

    @property
    def logits_S(self) -> torch.Tensor:
        """float32."""
        return self.bits[len(self.bits) // 3 * 2 :].view(torch.float32)


@dataclass(frozen=True, slots=True)
class SequenceEnds:
    """The places of drawn tokens: token_ids_MC[slots_S[s], lengths_S[s]], within M and C (not checked).

    The table is int32, slots and lengths are int64; ValueError where that is not so.
    """

    token_ids_MC: torch.Tensor
    slots_S: torch.Tensor
    lengths_S: torch.Tensor

    def __post_init__(self) -> None:
        table, rows = self.token_ids_MC, (self.slots_S, self.lengths_S)
        if table.dim() != 2 or table.dtype != torch.int32 or not table.is_contiguous():
            raise ValueError(f"token ids {tuple(table.shape)} {table.dtype} must be contiguous int32 [slots, tokens]")
        for name, tensor_S in zip(("slots", "lengths"), rows, strict=True):
            if tensor_S.shape != (len(self.slots_S),) or tensor_S.dtype != torch.int64 or not tensor_S.is_contiguous():
                raise ValueError(f"{name} {tuple(tensor_S.shape)} {tensor_S.dtype} must be contiguous int64, one a row")

    def append(self, tokens_S: torch.Tensor) -> None:
        self.token_ids_MC.index_put_((self.slots_S, self.lengths_S), tokens_S.int())


ENDS = ["end_token_ids", "end_slots", "end_lengths"]  # parameters of a kernel that appends, before end_stride


def ends_for_kernel(ends: SequenceEnds | None, num_rows: int) -> tuple[torch.Tensor | int | None, ...]:
    """Arguments for these parameters and `end_stride`. ValueError where there are not as many rows."""
    if ends is None:
        return None, None, None, 0
    if len(ends.slots_S) != num_rows:
        raise ValueError(f"{len(ends.slots_S)} slots of sequences for {num_rows} drawn rows")
    return ends.token_ids_MC, ends.slots_S, ends.lengths_S, ends.token_ids_MC.shape[1]


@triton.jit
def append_tokens(end_token_ids, end_slots, end_lengths, end_stride, row, tokens, mask):
    """Writes the tokens of rows where they go, if that was said."""
    if end_token_ids is not None:
        slot, length = tl.load(end_slots + row, mask, other=0), tl.load(end_lengths + row, mask, other=0)
        tl.store(end_token_ids + slot * end_stride + length, tokens.to(tl.int32), mask)
