"""Experts with biases and a clamped gate, as gpt-oss has them: each token through its chosen ones, then their weighted sum.

    gate, up = halves of x @ gate_up[e].T + gate_up_bias[e]       rounded to the dtype of x
    gate, up = min(gate, limit), clamp(up, -limit, limit)
    h        = gate * sigmoid(alpha * gate) * (up + 1)            rounded to the dtype of x
    out      = sum over a token's choices c of weights[c] * (h @ down[e_c].T + down_bias[e_c])
                                                                  float32, one rounding at the end

A choice whose expert id is negative contributes nothing (it belongs to another rank). There is only the reference yet: on CUDA
the op refuses. moe_mlp.py has experts without biases.

T tokens, C choices a token, E experts, H hidden, F intermediate, U = 2 F (gate in the first half). Source: the gpt-oss release.
"""

import torch

from .dispatch import choose_backend

# Largest |out - float64| for inputs of order one, weights of order 1 / sqrt(fan-in): (relative, absolute).
TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.float16: (1e-2, 4e-3), torch.bfloat16: (4e-2, 3e-2)}


def biased_moe_mlp(
    x_TH: torch.Tensor,
    gate_up_weight_EUH: torch.Tensor,
    gate_up_bias_EU: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    down_bias_EH: torch.Tensor | None,
    weights_TC: torch.Tensor,
    experts_TC: torch.Tensor,
    *,
    alpha: float,
    limit: float,
) -> torch.Tensor:
    """out [T, H] of x's dtype. `weights` float32, `experts` int32 below E. Without down_bias another rank adds it.

    ValueError where shapes do not fit, or on CUDA, which no kernel serves.
    """
    _check(x_TH, gate_up_weight_EUH, gate_up_bias_EU, down_weight_EHF, down_bias_EH, weights_TC, experts_TC)
    if choose_backend("biased_moe_mlp", x_TH, gate_up_weight_EUH, down_weight_EHF) == "triton":
        raise ValueError("biased_moe_mlp: no kernel serves CUDA yet: run on the CPU, or set PILOTFISH_KERNELS=ref")
    return biased_moe_mlp_ref(
        x_TH,
        gate_up_weight_EUH,
        gate_up_bias_EU,
        down_weight_EHF,
        down_bias_EH,
        weights_TC,
        experts_TC,
        alpha=alpha,
        limit=limit,
    )


def biased_moe_mlp_ref(
    x_TH: torch.Tensor,
    gate_up_weight_EUH: torch.Tensor,
    gate_up_bias_EU: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    down_bias_EH: torch.Tensor | None,
    weights_TC: torch.Tensor,
    experts_TC: torch.Tensor,
    *,
    alpha: float,
    limit: float,
) -> torch.Tensor:
    out_TH = torch.zeros_like(x_TH, dtype=torch.float32)
    for expert in experts_TC.unique().tolist():
        if expert < 0:
            continue
        tokens, choices = torch.where(experts_TC == expert)
        gate_up = x_TH[tokens].float() @ gate_up_weight_EUH[expert].float().T + gate_up_bias_EU[expert].float()
        gate, up = gate_up.to(x_TH.dtype).float().chunk(2, dim=-1)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        hidden = (gate * torch.sigmoid(alpha * gate) * (up + 1)).to(x_TH.dtype)
        y = hidden.float() @ down_weight_EHF[expert].float().T
        if down_bias_EH is not None:
            y += down_bias_EH[expert].float()
        out_TH.index_add_(0, tokens, y * weights_TC[tokens, choices, None])
    return out_TH.to(x_TH.dtype)


def _check(
    x_TH: torch.Tensor,
    gate_up_weight_EUH: torch.Tensor,
    gate_up_bias_EU: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    down_bias_EH: torch.Tensor | None,
    weights_TC: torch.Tensor,
    experts_TC: torch.Tensor,
) -> None:
    if x_TH.dim() != 2 or down_weight_EHF.dim() != 3:
        raise ValueError("biased_moe_mlp: x must be [T, H] and down_weight [E, H, F]")
    num_experts, hidden, intermediate = down_weight_EHF.shape
    if x_TH.shape[1] != hidden or gate_up_weight_EUH.shape != (num_experts, 2 * intermediate, hidden):
        raise ValueError(
            f"biased_moe_mlp: x {tuple(x_TH.shape)}, gate_up_weight {tuple(gate_up_weight_EUH.shape)} and down_weight "
            f"{tuple(down_weight_EHF.shape)} do not fit: [T, H], [E, 2 F, H], [E, H, F]"
        )
    if gate_up_bias_EU.shape != (num_experts, 2 * intermediate):
        raise ValueError(f"biased_moe_mlp: gate_up_bias {tuple(gate_up_bias_EU.shape)} must be [E, 2 F]")
    if down_bias_EH is not None and down_bias_EH.shape != (num_experts, hidden):
        raise ValueError(f"biased_moe_mlp: down_bias {tuple(down_bias_EH.shape)} must be [E, H]")
    if experts_TC.dim() != 2 or experts_TC.shape[0] != x_TH.shape[0] or weights_TC.shape != experts_TC.shape:
        raise ValueError(
            f"biased_moe_mlp: weights {tuple(weights_TC.shape)} and experts {tuple(experts_TC.shape)} must be [T, top_k]"
        )
