"""The experts of a mixture-of-experts layer: each token through its chosen gated MLPs, then their weighted sum.

    h   = gated_activation(x @ gate_up[e].T)       both rounded to the dtype of x
    out = sum over a token's choices c of weights[c] * (h @ down[e_c].T)       float32, one rounding at the end

A choice whose expert id is negative contributes nothing (it belongs to another rank). On CUDA few tokens are served by two
matrix-vector kernels (moe_gemv.py); more are sorted by expert (moe_sort.py), go through two grouped GEMMs (grouped_gemm.py),
whose weighted terms are rounded to the dtype of x, and are summed. moe_config.py chooses. routed_moe_mlp begins at the router's
logits.

T tokens, C choices a token, P = T * C pairs, E experts, H hidden, F intermediate, U = 2 F (gate in the first half).
"""

import torch
import triton
import triton.language as tl

from .cpu import ops as cpu_ops
from .dependent_launch import launch_options, let_next_start, load_settled, wait_for_previous
from .dispatch import choose_backend
from .gated_activation import check_activation, gated_activation_ref
from .grouped_gemm import gated_grouped_gemm, weighted_grouped_gemm
from .grouped_tiles import GroupedConfig
from .moe_config import MoeConfig, MoeSizes, choose_config
from .moe_gemv import GemvConfig, down_gemv, gated_gemv
from .moe_routing import ChosenExperts, RouterLogits, check_routing, route_tokens
from .moe_sort import sort_pairs

Order = tuple[torch.Tensor, torch.Tensor]  # of sort_pairs
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
        chosen = ChosenExperts(weights_TC=weights_TC, experts_TC=experts_TC)
        return _moe_mlp_triton(x_TH, gate_up_weight_EUH, down_weight_EHF, chosen, activation)
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


def routed_moe_mlp(
    x_TH: torch.Tensor, gate_up_weight_EUH: torch.Tensor, down_weight_EHF: torch.Tensor, routing: RouterLogits, activation: str
) -> torch.Tensor:
    """moe_mlp of what route_tokens chooses: out [T, H]. On CUDA the kernels of few tokens choose themselves: a launch less."""
    logits_TE = routing.logits_TE
    check_routing(logits_TE, routing.num_choices)
    if logits_TE.shape != (x_TH.shape[0], gate_up_weight_EUH.shape[0]):
        raise ValueError(
            f"moe_mlp: logits {tuple(logits_TE.shape)} must be [T, E] of x {tuple(x_TH.shape)} and gate_up_weight "
            f"{tuple(gate_up_weight_EUH.shape)}"
        )
    backend = choose_backend("moe_mlp", x_TH, gate_up_weight_EUH, down_weight_EHF)
    if backend == "triton":
        check_activation(activation)
        _check_experts(x_TH, gate_up_weight_EUH, down_weight_EHF)
        return _moe_mlp_triton(x_TH, gate_up_weight_EUH, down_weight_EHF, routing, activation)
    weights_TC, experts_TC = route_tokens(logits_TE, routing.num_choices, renormalize=routing.renormalize)
    return moe_mlp(x_TH, gate_up_weight_EUH, down_weight_EHF, weights_TC, experts_TC, activation)


@triton.jit
def _combine_kernel(
    y,
    experts,
    out,
    num_columns,
    NUM_CHOICES: tl.constexpr,
    AFTER_GATE_UP: tl.constexpr,
    EARLY_START: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a token and block of H: the sum of its choices, weighted already, in their order."""
    let_next_start(EARLY_START)
    if not AFTER_GATE_UP:
        wait_for_previous(EARLY_START)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    chosen = ()
    for choice in tl.static_range(NUM_CHOICES):
        chosen += (load_settled(experts + token * NUM_CHOICES + choice, True, -1),)  # type: ignore[assignment]
    if AFTER_GATE_UP:
        wait_for_previous(EARLY_START)
    total = tl.zeros([BLOCK], tl.float32)
    for choice in tl.static_range(NUM_CHOICES):
        # A mask rather than a branch: the loads of all choices are in flight together.
        here = (tl.broadcast_to(chosen[choice], [BLOCK]) >= 0) & (column < num_columns)
        total += tl.load(y + (token * NUM_CHOICES + choice) * num_columns + column, here, other=0.0).to(tl.float32)
    tl.store(out + token * num_columns + column, total.to(out.dtype.element_ty), column < num_columns)


def _combine(y_PH: torch.Tensor, experts_TC: torch.Tensor, *, after_gate_up: bool) -> torch.Tensor:
    (num_tokens, num_choices), num_columns = experts_TC.shape, y_PH.shape[1]
    out_TH = y_PH.new_empty(num_tokens, num_columns)
    block = min(triton.next_power_of_2(num_columns), 1024)
    _combine_kernel[(num_tokens, triton.cdiv(num_columns, block))](
        y_PH,
        experts_TC,
        out_TH,
        num_columns,
        NUM_CHOICES=num_choices,
        AFTER_GATE_UP=after_gate_up,
        BLOCK=block,
        **launch_options(y_PH.device),
    )
    return out_TH


def _moe_mlp_triton(
    x_TH: torch.Tensor,
    gate_up_weight_EUH: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    routing: ChosenExperts | RouterLogits,
    activation: str,
) -> torch.Tensor:
    num_experts, hidden, intermediate = down_weight_EHF.shape
    num_tokens, num_choices = x_TH.shape[0], routing.num_choices
    if x_TH.numel() == 0:
        return x_TH.new_empty(num_tokens, hidden)
    sizes = MoeSizes(
        num_tokens=num_tokens, num_choices=num_choices, num_experts=num_experts, hidden=hidden, intermediate=intermediate
    )
    gate_up, down = choose_config("moe_gate_up", sizes, x_TH), choose_config("moe_down", sizes, x_TH)
    routing, order = prepare_routing(routing, num_experts, gate_up, down)
    return run_experts(x_TH, gate_up_weight_EUH, down_weight_EHF, routing, order, activation, gate_up=gate_up, down=down)


def prepare_routing(
    routing: ChosenExperts | RouterLogits, num_experts: int, *configs: MoeConfig
) -> tuple[ChosenExperts | RouterLogits, Order | None]:
    """What kernels of these configs need: matrix-vector ones neither chosen experts nor an order, grouped GEMMs both."""
    if all(isinstance(config, GemvConfig) for config in configs):
        return routing, None
    if isinstance(routing, RouterLogits):
        weights_TC, experts_TC = route_tokens(routing.logits_TE, routing.num_choices, renormalize=routing.renormalize)
        routing = ChosenExperts(weights_TC=weights_TC, experts_TC=experts_TC)
    return routing, sort_pairs(routing.experts_TC, num_experts)


def run_experts(
    x_TH: torch.Tensor,
    gate_up_weight_EUH: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    routing: ChosenExperts | RouterLogits,
    order: Order | None,
    activation: str,
    *,
    gate_up: MoeConfig,
    down: MoeConfig,
) -> torch.Tensor:
    """out [T, H] of what prepare_routing answers. Nothing may come between these two, see `after_gate_up` of run_down."""
    sorted_rows = isinstance(gate_up, GroupedConfig) and isinstance(down, GroupedConfig)
    h_PF = run_gate_up(x_TH, gate_up_weight_EUH, routing, order, activation, config=gate_up, sorted_rows=sorted_rows)
    return run_down(h_PF, down_weight_EHF, routing, order, config=down, sorted_rows=sorted_rows, after_gate_up=True)


def run_gate_up(
    x_TH: torch.Tensor,
    gate_up_weight_EUH: torch.Tensor,
    routing: ChosenExperts | RouterLogits,
    order: Order | None,
    activation: str,
    *,
    config: MoeConfig,
    sorted_rows: bool,
) -> torch.Tensor:
    """h [P, F]. `routing` and `order` as prepare_routing answers for the config; `sorted_rows`: between grouped GEMMs only."""
    if isinstance(config, GemvConfig):
        return gated_gemv(x_TH, gate_up_weight_EUH, routing, activation, config=config)
    assert order is not None
    return gated_grouped_gemm(x_TH, gate_up_weight_EUH, *order, activation, config=config, sorted_rows=sorted_rows)


def run_down(
    h_PF: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    routing: ChosenExperts | RouterLogits,
    order: Order | None,
    *,
    config: MoeConfig,
    sorted_rows: bool,
    after_gate_up: bool,
) -> torch.Tensor:
    """out [T, H]. `routing`, `order` and `sorted_rows` as in run_gate_up.

    `after_gate_up`: the caller launched run_gate_up just before, or has waited since `routing` and `order` were written. The
    kernels then read them, and weights, while that one ends: it lets them start only when what came before has finished.
    """
    if isinstance(config, GemvConfig):
        return down_gemv(h_PF, down_weight_EHF, routing, config=config, after_gate_up=after_gate_up)
    assert order is not None
    assert isinstance(routing, ChosenExperts)
    y_PH = weighted_grouped_gemm(
        h_PF,
        down_weight_EHF,
        routing.weights_TC,
        *order,
        config=config,
        sorted_rows=sorted_rows,
        after_gate_up=after_gate_up,
    )
    return _combine(y_PH, routing.experts_TC, after_gate_up=after_gate_up)


def _check(
    x_TH: torch.Tensor,
    gate_up_weight_EUH: torch.Tensor,
    down_weight_EHF: torch.Tensor,
    weights_TC: torch.Tensor,
    experts_TC: torch.Tensor,
) -> None:
    _check_experts(x_TH, gate_up_weight_EUH, down_weight_EHF)
    if experts_TC.dim() != 2 or experts_TC.shape[0] != x_TH.shape[0] or weights_TC.shape != experts_TC.shape:
        raise ValueError(f"moe_mlp: weights {tuple(weights_TC.shape)} and experts {tuple(experts_TC.shape)} must be [T, top_k]")
    if not weights_TC.is_contiguous() or not experts_TC.is_contiguous():
        raise ValueError("moe_mlp: weights and experts must be contiguous")
    if weights_TC.dtype != torch.float32 or experts_TC.dtype != torch.int32:
        raise ValueError(f"moe_mlp: weights must be float32, experts int32: {weights_TC.dtype}, {experts_TC.dtype}")


def _check_experts(x_TH: torch.Tensor, gate_up_weight_EUH: torch.Tensor, down_weight_EHF: torch.Tensor) -> None:
    if x_TH.dim() != 2 or gate_up_weight_EUH.dim() != 3 or down_weight_EHF.dim() != 3:
        raise ValueError("moe_mlp: x must be [T, H], gate_up_weight [E, 2 F, H], down_weight [E, H, F]")
    num_experts, hidden, intermediate = down_weight_EHF.shape
    if x_TH.shape[1] != hidden or gate_up_weight_EUH.shape != (num_experts, 2 * intermediate, hidden):
        raise ValueError(
            f"moe_mlp: x {tuple(x_TH.shape)}, gate_up_weight {tuple(gate_up_weight_EUH.shape)} and down_weight "
            f"{tuple(down_weight_EHF.shape)} do not fit: [T, H], [E, 2 F, H], [E, H, F]"
        )
    if any(x.stride(-1) != 1 for x in (x_TH, gate_up_weight_EUH, down_weight_EHF)):
        raise ValueError("moe_mlp: the last dimension of x and of the weights must be contiguous")
