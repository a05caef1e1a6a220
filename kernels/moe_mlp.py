"""The experts of a mixture-of-experts layer: each token through its chosen gated MLPs, then their weighted sum.

    h   = gated_activation(x @ gate_up[e].T)       both rounded to the dtype of x
    out = sum over a token's choices c of weights[c] * (h @ down[e_c].T)       float32, one rounding at the end

A choice whose expert id is negative contributes nothing (it belongs to another rank). T tokens, C choices a token, E
experts, H hidden, F intermediate, U = 2 F (gate in the first half).
"""

import torch
import triton
import triton.language as tl

from .cpu import ops as cpu_ops
from .dispatch import choose_backend
from .gated_activation import check_activation, gated_activation, gated_activation_ref
from .grouped_gemm import grouped_gemm, sort_by_expert

# Largest |out - reference| for inputs of order one, weights of order 1 / sqrt(fan-in): (relative, absolute).
TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.float16: (1e-2, 4e-3), torch.bfloat16: (4e-2, 3e-2)}


def moe_mlp(
    x_TH: torch.Tensor,
    gate_up_weight_EUH: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    weights_TC: torch.Tensor,
    experts_TC: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """out [T, H] of x's dtype. `weights` float32, `experts` int32 below E (not checked on the device).

    `activation` as in gated_activation. ValueError where shapes or dtypes do not fit.
    """
    check_activation(activation)
    _check(x_TH, gate_up_weight_EUH, down_weight_EHF, weights_TC, experts_TC)
    args = (x_TH, gate_up_weight_EUH, down_weight_EHF, weights_TC, experts_TC, activation)
    backend = choose_backend("moe_mlp", x_TH, gate_up_weight_EUH, down_weight_EHF)
    if backend == "cpp":
        return cpu_ops.moe_mlp(*args)
    if backend == "triton":
        return _moe_mlp_triton(*args)
    return moe_mlp_ref(*args)


def moe_mlp_ref(
    x_TH: torch.Tensor,
    gate_up_weight_EUH: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    weights_TC: torch.Tensor,
    experts_TC: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    out_TH = torch.zeros_like(x_TH, dtype=torch.float32)
    for expert in range(gate_up_weight_EUH.shape[0]):
        tokens, choices = torch.where(experts_TC == expert)
        gate_up = (x_TH[tokens].float() @ gate_up_weight_EUH[expert].float().T).to(x_TH.dtype)
        hidden = gated_activation_ref(gate_up, activation)
        y = hidden.float() @ down_weight_EHF[expert].float().T
        out_TH.index_add_(0, tokens, y * weights_TC[tokens, choices, None])
    return out_TH.to(x_TH.dtype)


@triton.jit
def _combine_kernel(y, weights, experts, out, num_experts, hidden, NUM_CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """One program a token and block of H: the weighted sum of its choices, in their order."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(NUM_CHOICES):
        pair = token * NUM_CHOICES + choice
        expert = tl.load(experts + pair)
        if (expert >= 0) & (expert < num_experts):
            total += tl.load(weights + pair) * tl.load(y + pair * hidden + column, column < hidden, other=0.0)
    tl.store(out + token * hidden + column, total.to(out.dtype.element_ty), column < hidden)


def _moe_mlp_triton(
    x_TH: torch.Tensor,
    gate_up_weight_EUH: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    weights_TC: torch.Tensor,
    experts_TC: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    (num_tokens, hidden), num_choices = x_TH.shape, experts_TC.shape[1]
    num_experts = down_weight_EHF.shape[0]
    out_TH = x_TH.new_empty(num_tokens, hidden)
    if out_TH.numel() == 0:
        return out_TH
    order = sort_by_expert(experts_TC, num_experts)
    # The first GEMM reads each choice's token and writes in the order of experts; the second goes back.
    gate_up = x_TH.new_empty(num_tokens * num_choices, gate_up_weight_EUH.shape[1])
    grouped_gemm(x_TH, gate_up_weight_EUH, gate_up, order, choices_per_row=num_choices, scatter=False)
    hidden_states = gated_activation(gate_up, activation)
    y = torch.empty(num_tokens * num_choices, hidden, dtype=torch.float32, device=x_TH.device)
    grouped_gemm(hidden_states, down_weight_EHF, y, order, choices_per_row=None, scatter=True)
    block = min(triton.next_power_of_2(hidden), 1024)
    _combine_kernel[(num_tokens, triton.cdiv(hidden, block))](
        y, weights_TC, experts_TC, out_TH, num_experts, hidden, NUM_CHOICES=num_choices, BLOCK=block
    )
    return out_TH


def _check(
    x_TH: torch.Tensor,
    gate_up_weight_EUH: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    weights_TC: torch.Tensor,
    experts_TC: torch.Tensor,
) -> None:
    if x_TH.dim() != 2 or gate_up_weight_EUH.dim() != 3 or down_weight_EHF.dim() != 3:
        raise ValueError("moe_mlp: x must be [T, H], gate_up_weight [E, 2 F, H], down_weight [E, H, F]")
    num_experts, hidden, intermediate = down_weight_EHF.shape
    if x_TH.shape[1] != hidden or gate_up_weight_EUH.shape != (num_experts, 2 * intermediate, hidden):
        raise ValueError(
            f"moe_mlp: x {tuple(x_TH.shape)}, gate_up_weight {tuple(gate_up_weight_EUH.shape)} and down_weight "
            f"{tuple(down_weight_EHF.shape)} do not fit: [T, H], [E, 2 F, H], [E, H, F]"
        )
    if experts_TC.dim() != 2 or experts_TC.shape[0] != x_TH.shape[0] or weights_TC.shape != experts_TC.shape:
        raise ValueError(f"moe_mlp: weights {tuple(weights_TC.shape)} and experts {tuple(experts_TC.shape)} must be [T, top_k]")
    if any(x.stride(-1) != 1 for x in (x_TH, gate_up_weight_EUH, down_weight_EHF)):
        raise ValueError("moe_mlp: the last dimension of x and of the weights must be contiguous")
    if not weights_TC.is_contiguous() or not experts_TC.is_contiguous():
        raise ValueError("moe_mlp: weights and experts must be contiguous")
    if weights_TC.dtype != torch.float32 or experts_TC.dtype != torch.int32:
        raise ValueError(f"moe_mlp: weights must be float32, experts int32: {weights_TC.dtype}, {experts_TC.dtype}")
