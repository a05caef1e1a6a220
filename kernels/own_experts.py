"""A rank's own numbers of the experts that tokens chose, where ranks share the experts.

    own[t, c] = experts[t, c] - first   if 0 <= experts[t, c] - first < num_own, else -1

T tokens, C choices.
"""

import torch
import triton
import triton.language as tl

from .dependent_launch import launch_options, let_next_start, wait_for_previous
from .dispatch import kernel_mode

_BLOCK = 1024


def own_experts(experts_TC: torch.Tensor, *, first: int, num_own: int) -> torch.Tensor:
    """int32 [T, C], contiguous. ValueError unless `experts` are."""
    if experts_TC.dtype != torch.int32 or not experts_TC.is_contiguous():
        raise ValueError(f"own_experts: experts {tuple(experts_TC.shape)} {experts_TC.dtype} must be contiguous int32")
    if experts_TC.device.type == "cuda" and kernel_mode() != "ref":
        return own_experts_triton(experts_TC, first=first, num_own=num_own)
    return own_experts_ref(experts_TC, first=first, num_own=num_own)


def own_experts_ref(experts_TC: torch.Tensor, *, first: int, num_own: int) -> torch.Tensor:
    own_TC = experts_TC - first
    return torch.where((own_TC >= 0) & (own_TC < num_own), own_TC, -1)


@triton.jit
def _own_experts_kernel(experts, own, size, first, num_own, EARLY_START: tl.constexpr, BLOCK: tl.constexpr):
    let_next_start(EARLY_START)
    wait_for_previous(EARLY_START)
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(experts + pair, pair < size, other=-1) - first
    tl.store(own + pair, tl.where((number >= 0) & (number < num_own), number, -1), pair < size)


def own_experts_triton(experts_TC: torch.Tensor, *, first: int, num_own: int) -> torch.Tensor:
    own_TC, size = torch.empty_like(experts_TC), experts_TC.numel()
    if size:
        grid = (triton.cdiv(size, _BLOCK),)
        _own_experts_kernel[grid](experts_TC, own_TC, size, first, num_own, BLOCK=_BLOCK, **launch_options(experts_TC.device))
    return own_TC
