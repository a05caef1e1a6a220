"""What comes before the experts of a sparse layer: the norm, the router and the choice, for few tokens in one kernel.

    r       = x + residual, y = norm(r)          as rms_norm
    logits  = y @ router.T                       as linear, rounded to the dtype of x
    weights, experts                             as route_tokens of the logits

Each of the three is a launch and a round trip to memory of its own, for half a megabyte of work: one CUDA C++ kernel
(cuda/norm_and_route.cu) does all where it was measured to be faster (op "norm_and_route" of the tuned table, sizes (E, C, H),
{"kernel": "fused"}); elsewhere the three ops serve. T tokens, H hidden, E experts, C = top_k choices.
"""

from __future__ import annotations

import ctypes

import torch
import triton

from . import tuning
from .cuda import loader
from .dispatch import kernel_mode
from .linear import linear
from .moe_routing import route_tokens
from .rms_norm import rms_norm

SOURCE = "norm_and_route"
NUM_RANKS = 8  # of a cluster
MAX_TOKENS, MAX_CHOICES = 128, 32
HIDDENS, EXPERTS = (2048, 4096), (64, 128, 256)
MAX_ROUTER_NUMBERS = 4096 * 128  # that a cluster keeps in registers

Routed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # y and r [T, H], weights and experts [T, C]


def norm_and_route(
    x_TH: torch.Tensor,
    residual_TH: torch.Tensor,
    norm_weight_H: torch.Tensor,
    eps: float,
    router_EH: torch.Tensor,
    top_k: int,
    *,
    renormalize: bool,
) -> Routed:
    """(y, r, weights float32, experts int32). ValueError where shapes or dtypes do not fit, as of the three ops."""
    arguments = (x_TH, residual_TH, norm_weight_H, eps, router_EH, top_k)
    is_chosen = x_TH.device.type == "cuda" and _is_chosen(x_TH, router_EH, top_k)
    if is_chosen and unfit_reason(x_TH, residual_TH, norm_weight_H, router_EH, top_k) is None:
        return fused_norm_and_route(*arguments, renormalize=renormalize)
    return separate_norm_and_route(*arguments, renormalize=renormalize)


def separate_norm_and_route(
    x_TH: torch.Tensor,
    residual_TH: torch.Tensor,
    norm_weight_H: torch.Tensor,
    eps: float,
    router_EH: torch.Tensor,
    top_k: int,
    *,
    renormalize: bool,
) -> Routed:
    """By the three ops."""
    y_TH, sum_TH = rms_norm(x_TH, norm_weight_H, eps, residual_TH=residual_TH)
    return y_TH, sum_TH, *route_tokens(linear(y_TH, router_EH), top_k, renormalize=renormalize)


def fused_norm_and_route(
    x_TH: torch.Tensor,
    residual_TH: torch.Tensor,
    norm_weight_H: torch.Tensor,
    eps: float,
    router_EH: torch.Tensor,
    top_k: int,
    *,
    renormalize: bool,
) -> Routed:
    """By one kernel. ValueError where `unfit_reason` has one."""
    reason = unfit_reason(x_TH, residual_TH, norm_weight_H, router_EH, top_k)
    if reason is not None:
        raise ValueError(f"norm_and_route: {reason}")
    tokens = _tokens_a_cluster(x_TH.shape[0])
    kernel = _load(router_EH, tokens)
    assert kernel is not None  # unfit_reason has loaded it
    num_tokens, hidden = x_TH.shape
    y_TH, sum_TH = (torch.empty_like(x_TH, memory_format=torch.contiguous_format) for _ in range(2))
    weights_TC = torch.empty(num_tokens, top_k, dtype=torch.float32, device=x_TH.device)
    experts_TC = torch.empty(num_tokens, top_k, dtype=torch.int32, device=x_TH.device)
    tensors = (x_TH, residual_TH, norm_weight_H, router_EH, y_TH, sum_TH, weights_TC, experts_TC)
    loader.launch(
        kernel,
        (
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
            ctypes.c_int(num_tokens),
            ctypes.c_int(x_TH.stride(0)),
            ctypes.c_int(residual_TH.stride(0)),
            ctypes.c_float(eps),
            ctypes.c_int(top_k),
            ctypes.c_int(renormalize),
        ),
        grid=(NUM_RANKS, triton.cdiv(num_tokens, tokens)),
        num_threads=hidden // 8,
        shared_bytes=0,
        cluster_size=NUM_RANKS,
        early_start=True,
    )
    return y_TH, sum_TH, weights_TC, experts_TC


def unfit_reason(
    x_TH: torch.Tensor, residual_TH: torch.Tensor, norm_weight_H: torch.Tensor, router_EH: torch.Tensor, top_k: int
) -> str | None:
    """Why the kernel cannot run on these, or None; logged once a reason, but for the number of tokens. Compiles at first."""
    if x_TH.dim() != 2 or not 0 < x_TH.shape[0] <= MAX_TOKENS:
        return f"x {tuple(x_TH.shape)}, it takes 1 to {MAX_TOKENS} tokens"
    tensors = (x_TH, residual_TH, norm_weight_H, router_EH)
    num_experts, hidden = router_EH.shape
    reason = None
    if num_experts not in EXPERTS or hidden not in HIDDENS or num_experts * hidden > MAX_ROUTER_NUMBERS:
        reason = (
            f"a router of {num_experts} experts x {hidden}: it takes {EXPERTS} x {HIDDENS}, up to {MAX_ROUTER_NUMBERS} numbers"
        )
    elif not 0 < top_k <= min(MAX_CHOICES, num_experts):
        reason = f"top_k {top_k} is not 1 to {min(MAX_CHOICES, num_experts)}"
    elif x_TH.shape[1] != hidden or residual_TH.shape != x_TH.shape or norm_weight_H.shape != (hidden,):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        reason = f"x, residual, weight of the norm and router {shapes} do not fit"
    elif x_TH.dtype not in (torch.bfloat16, torch.float16) or any(tensor.dtype != x_TH.dtype for tensor in tensors):
        reason = f"dtypes {[tensor.dtype for tensor in tensors]}: all must be bfloat16 or all float16"
    elif not router_EH.is_contiguous() or any(tensor.stride(-1) != 1 or not _is_aligned(tensor) for tensor in tensors):
        reason = "rows must be contiguous and begin at multiples of 16 bytes"
    elif not loader.can_run_on(x_TH.device):
        reason = loader.misplaced_reason("x", x_TH.device)
    elif _load(router_EH, _tokens_a_cluster(x_TH.shape[0])) is None:
        return f"it cannot be compiled: {loader.unavailable_reason()}"  # the loader has warned itself
    if reason is not None:
        loader.warn_unserved(SOURCE, reason, "three kernels do")
    return reason


def _is_chosen(x_TH: torch.Tensor, router_EH: torch.Tensor, top_k: int) -> bool:
    if kernel_mode() == "invariant":  # larger batches have no fused kernel
        return False
    sizes = (router_EH.shape[0], top_k, router_EH.shape[1])
    config = tuning.lookup("norm_and_route", x_TH.dtype, sizes, x_TH.shape[0], x_TH.device)
    return config is not None and config["kernel"] == "fused"


def _is_aligned(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0 and (tensor.dim() == 1 or tensor.stride(0) % 8 == 0)


def _tokens_a_cluster(num_tokens: int) -> int:
    """One while all clusters fit on the GPU at once."""
    return 1 if num_tokens <= 16 else 8


def _load(router_EH: torch.Tensor, tokens_a_cluster: int) -> loader.Kernel | None:
    num_experts, hidden = router_EH.shape
    is_float16 = int(router_EH.dtype == torch.float16)
    macros = (("HIDDEN", hidden), ("EXPERTS", num_experts), ("TOKENS", tokens_a_cluster), ("FLOAT16", is_float16))
    return loader.load(SOURCE, macros, router_EH.device.index)
