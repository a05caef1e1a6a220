"""The experts of a mixture-of-experts layer: each token through its chosen gated MLPs, then their weighted sum.

    h   = gated_activation(x @ gate_up[e].T + gate_up_bias[e])       both rounded to the dtype of x
    out = sum over a token's choices c of weights[c] * (h @ down[e_c].T + down_bias[e_c])       float32, one rounding at the end

A choice whose expert id is negative contributes nothing (it belongs to another rank). On CUDA few tokens are served by two
matrix-vector kernels (moe_gemv.py). The pairs of more are sorted by expert (moe_sort.py), go through two grouped GEMMs
(grouped_gemm.py) or their twins for few pairs an expert (streaming_experts.py) and for many (tall_experts.py), whose weighted
terms are rounded to the dtype of x and left to be summed (expert_terms.py). moe_config.py chooses for each of the two products.
Biases and a clamped gate (gpt-oss has both) are known to the Triton kernels and to the reference, not to those of CUDA C++ nor
to the CPU's.

T tokens, C choices a token, P = T * C pairs, E experts, H hidden, F intermediate, U = 2 F (gate in the first half).
"""

import torch

from .clamped_gate import ClampedGate
from .cpu import ops as cpu_ops
from .dispatch import choose_backend
from .expert_terms import ExpertTerms, Summands
from .gated_activation import Activation, check_activation, gated_activation_ref
from .grouped_gemm import gated_grouped_gemm, weighted_grouped_gemm
from .grouped_tiles import GroupedConfig
from .moe_config import MoeConfig, MoeSizes, choose_config, is_plain
from .moe_gemv import GemvConfig, down_gemv, gated_gemv
from .moe_sort import sort_pairs
from .streaming_experts import Routing, StreamingConfig, streaming_experts
from .tall_experts import TallConfig, tall_experts

Order = tuple[torch.Tensor, torch.Tensor]  # of sort_pairs
# Largest |out - reference| for inputs of order one, weights of order 1 / sqrt(fan-in): (relative, absolute).
TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.float16: (1e-2, 4e-3), torch.bfloat16: (4e-2, 3e-2)}


def moe_mlp(
    x_TH: torch.Tensor,
    gate_up_weight_EUH: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    weights_TC: torch.Tensor,
    experts_TC: torch.Tensor,
    activation: Activation,
    *,
    gate_up_bias_EU: torch.Tensor | None = None,
    down_bias_EH: torch.Tensor | None = None,
) -> Summands:
    """out [T, H] of x's dtype, or its terms. `weights` float32, `experts` int32 below E (not checked on the device).

    `activation` as in gated_activation, or a clamped gate. ValueError where shapes or dtypes do not fit.
    """
    if not isinstance(activation, ClampedGate):
        check_activation(activation)
    _check(x_TH, gate_up_weight_EUH, down_weight_EHF, weights_TC, experts_TC)
    _check_biases(gate_up_weight_EUH, down_weight_EHF, gate_up_bias_EU, down_bias_EH)
    args = (x_TH, gate_up_weight_EUH, down_weight_EHF, weights_TC, experts_TC)
    plain = is_plain(activation, gate_up_bias_EU) and is_plain(None, down_bias_EH)
    backend = choose_backend("moe_mlp" if plain else "moe_mlp with biases", x_TH, gate_up_weight_EUH, down_weight_EHF)
    if backend == "cpp":
        assert isinstance(activation, str)
        return cpu_ops.moe_mlp(*args, activation)
    run = _moe_mlp_triton if backend == "triton" else moe_mlp_ref
    return run(*args, activation, gate_up_bias_EU=gate_up_bias_EU, down_bias_EH=down_bias_EH)


def moe_mlp_ref(
    x_TH: torch.Tensor,
    gate_up_weight_EUH: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    weights_TC: torch.Tensor,
    experts_TC: torch.Tensor,
    activation: Activation,
    *,
    gate_up_bias_EU: torch.Tensor | None = None,
    down_bias_EH: torch.Tensor | None = None,
) -> torch.Tensor:
    out_TH = torch.zeros_like(x_TH, dtype=torch.float32)
    for expert in experts_TC.unique().tolist():
        if expert < 0:
            continue
        tokens, choices = torch.where(experts_TC == expert)
        gate_up = x_TH[tokens].float() @ gate_up_weight_EUH[expert].float().T
        if gate_up_bias_EU is not None:
            gate_up += gate_up_bias_EU[expert].float()
        hidden = gated_activation_ref(gate_up.to(x_TH.dtype), activation)
        y = hidden.float() @ down_weight_EHF[expert].float().T
        if down_bias_EH is not None:
            y += down_bias_EH[expert].float()
        out_TH.index_add_(0, tokens, y * weights_TC[tokens, choices, None])
    return out_TH.to(x_TH.dtype)


def _moe_mlp_triton(
    x_TH: torch.Tensor,
    gate_up_weight_EUH: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    weights_TC: torch.Tensor,
    experts_TC: torch.Tensor,
    activation: Activation,
    *,
    gate_up_bias_EU: torch.Tensor | None = None,
    down_bias_EH: torch.Tensor | None = None,
) -> Summands:
    (num_experts, hidden, intermediate), (num_tokens, num_choices) = down_weight_EHF.shape, experts_TC.shape
    if x_TH.numel() == 0:
        return x_TH.new_empty(num_tokens, hidden)
    sizes = MoeSizes(
        num_tokens=num_tokens, num_choices=num_choices, num_experts=num_experts, hidden=hidden, intermediate=intermediate
    )
    plain = is_plain(activation, gate_up_bias_EU)
    return run_experts(
        x_TH,
        gate_up_weight_EUH,
        down_weight_EHF,
        weights_TC,
        experts_TC,
        activation,
        gate_up=choose_config("moe_gate_up", sizes, x_TH, gate_up_weight_EUH, plain=plain),
        down=choose_config("moe_down", sizes, x_TH, down_weight_EHF, plain=is_plain(None, down_bias_EH)),
        gate_up_bias_EU=gate_up_bias_EU,
        down_bias_EH=down_bias_EH,
    )


def run_experts(
    x_TH: torch.Tensor,
    gate_up_weight_EUH: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    weights_TC: torch.Tensor,
    experts_TC: torch.Tensor,
    activation: Activation,
    *,
    gate_up: MoeConfig,
    down: MoeConfig,
    gate_up_bias_EU: torch.Tensor | None = None,
    down_bias_EH: torch.Tensor | None = None,
) -> Summands:
    """out [T, H], or its terms. Nothing may come between the two products, see `after_gate_up` of run_down."""
    first_is_gemv, second_is_gemv = isinstance(gate_up, GemvConfig), isinstance(down, GemvConfig)
    order = None if first_is_gemv and second_is_gemv else sort_pairs(experts_TC, down_weight_EHF.shape[0])
    sorted_rows = not first_is_gemv and not second_is_gemv
    h_PF = run_gate_up(
        x_TH,
        gate_up_weight_EUH,
        experts_TC,
        order,
        activation,
        config=gate_up,
        sorted_rows=sorted_rows,
        bias_EU=gate_up_bias_EU,
    )
    return run_down(
        h_PF,
        down_weight_EHF,
        weights_TC,
        experts_TC,
        order,
        config=down,
        sorted_rows=sorted_rows,
        after_gate_up=not first_is_gemv,  # the others' kernels wait before they let the next start
        bias_EH=down_bias_EH,
    )


def run_gate_up(
    x_TH: torch.Tensor,
    gate_up_weight_EUH: torch.Tensor,
    experts_TC: torch.Tensor,
    order: Order | None,
    activation: Activation,
    *,
    config: MoeConfig,
    sorted_rows: bool,
    bias_EU: torch.Tensor | None = None,
) -> torch.Tensor:
    """h [P, F], its rows in the order of `order`'s pairs where `sorted_rows`. A matrix-vector kernel knows neither."""
    if isinstance(config, GemvConfig):
        return gated_gemv(x_TH, gate_up_weight_EUH, experts_TC, activation, config=config, bias_EU=bias_EU)
    assert order is not None
    if isinstance(config, GroupedConfig):
        return gated_grouped_gemm(
            x_TH, gate_up_weight_EUH, *order, activation, config=config, sorted_rows=sorted_rows, bias_EU=bias_EU
        )
    assert isinstance(activation, str), "choose_config has seen to it"
    assert bias_EU is None
    h_PF = x_TH.new_empty(experts_TC.numel(), gate_up_weight_EUH.shape[1] // 2)
    nearly_all_are_chosen = experts_TC.numel() >= 2 * gate_up_weight_EUH.shape[0]
    routing = Routing.ASSUME_ALL if nearly_all_are_chosen else Routing.AFTER_WAIT
    _run_cuda(x_TH, gate_up_weight_EUH, None, h_PF, order, activation, config=config, routing=routing, sorted_rows=sorted_rows)
    return h_PF


def run_down(
    h_PF: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    weights_TC: torch.Tensor,
    experts_TC: torch.Tensor,
    order: Order | None,
    *,
    config: MoeConfig,
    sorted_rows: bool,
    after_gate_up: bool,
    bias_EH: torch.Tensor | None = None,
) -> Summands:
    """out [T, H] of a matrix-vector kernel, else its terms. `order` and `sorted_rows` as in run_gate_up.

    `after_gate_up`: the caller launched run_gate_up just before, with a kernel that waits before it lets the next start, or has
    waited since `experts` and `order` were written. The kernels then read these, and weights, while that one ends.
    """
    if isinstance(config, GemvConfig):
        return down_gemv(h_PF, down_weight_EHF, weights_TC, experts_TC, config=config, bias_EH=bias_EH)
    assert order is not None
    if isinstance(config, GroupedConfig):
        y_PH = weighted_grouped_gemm(
            h_PF,
            down_weight_EHF,
            weights_TC,
            *order,
            config=config,
            sorted_rows=sorted_rows,
            after_gate_up=after_gate_up,
            bias_EH=bias_EH,
        )
        return ExpertTerms(y_PH, experts_TC)
    assert bias_EH is None, "choose_config has seen to it"
    y_PH = h_PF.new_empty(h_PF.shape[0], down_weight_EHF.shape[1])
    routing = Routing.BEFORE_WAIT if after_gate_up else Routing.AFTER_WAIT
    _run_cuda(h_PF, down_weight_EHF, weights_TC, y_PH, order, None, config=config, routing=routing, sorted_rows=sorted_rows)
    return ExpertTerms(y_PH, experts_TC)


def _run_cuda(
    x: torch.Tensor,
    weight_EUK: torch.Tensor,
    weights_TC: torch.Tensor | None,
    y: torch.Tensor,
    order: Order,
    activation: str | None,
    *,
    config: StreamingConfig | TallConfig,
    routing: Routing,
    sorted_rows: bool,
) -> None:
    """Writes y by a kernel of CUDA C++; only the streaming one asks when it may read the routing."""
    if isinstance(config, TallConfig):
        tall_experts(x, weight_EUK, weights_TC, y, *order, activation=activation, config=config, sorted_rows=sorted_rows)
        return
    streaming_experts(
        x, weight_EUK, weights_TC, y, *order, activation=activation, config=config, routing=routing, sorted_rows=sorted_rows
    )


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


def _check_biases(
    gate_up_weight_EUH: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    gate_up_bias_EU: torch.Tensor | None,
    down_bias_EH: torch.Tensor | None,
) -> None:
    for name, bias, weight in (("gate_up", gate_up_bias_EU, gate_up_weight_EUH), ("down", down_bias_EH, down_weight_EHF)):
        if bias is None:
            continue
        if bias.shape != weight.shape[:2] or not bias.is_contiguous():
            raise ValueError(f"moe_mlp: {name}_bias {tuple(bias.shape)} must be {tuple(weight.shape[:2])}, contiguous")
        if bias.device != weight.device or bias.dtype != weight.dtype:
            raise ValueError(
                f"moe_mlp: {name}_bias {bias.dtype} on {bias.device} must be as its weight, {weight.dtype} on {weight.device}"
            )
