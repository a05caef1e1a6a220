"""From the outputs of a layer's attention to what the next layer's attention reads: the rest of a layer as one op.

    s = attended @ output.T + residual
    d = the gated MLP of norm(s), or that of the experts which the router chooses for it, weighted and summed
    r = d + s, y = norm(r) @ next.T         where another layer follows; else y = d and r = s

A decode step of few rows is a chain of such weights, each of which is read in some microseconds. Between two kernels the memory
idles for two or three of them, until results have travelled and the first bytes of the next weight arrive. One CUDA C++ kernel
(cuda/between_attentions.cu) reads all of a layer's weights without a stop, for up to MAX_ROWS rows, on compute capability 9.0,
where it was measured to be faster; `separate_layer` is the same by the ops that serve otherwise, with the same roundings. The
tuned table has it as op "between_attentions", sizes (H, Q, F, E, C, N), with the config
    {"kernel": "fused", "max_in_flight", "prefetches"}
how many chunks of weights each CTA waits for at once, for more of them only make everything else wait; numbers of the next
layer's weight that each CTA asks L2 for while nobody knows yet which experts are read.

T tokens, Q what attention leaves of each, H hidden, F intermediate, E experts (1: a dense layer), C choices, N outputs of next.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass

import torch

from . import tuning
from .cuda import loader
from .dispatch import kernel_mode
from .expert_terms import Summands, sum_terms_and_norm
from .gated_activation import ACTIVATIONS
from .gated_linear import gated_linear
from .linear import linear
from .moe_mlp import moe_mlp
from .norm_and_route import norm_and_route
from .rms_norm import rms_norm
from .tuning import Config

SOURCE = "between_attentions"
MAX_ROWS = 8
MAX_PAIRS = 64  # rows times choices
MAX_HIDDEN = 8192
EXPERTS = (32, 64, 128, 256)
GROUP = 8  # rows of a weight: outputs are a multiple
NORM_STEP = 256  # numbers of inputs are a multiple

# As in the source.
_NUM_THREADS, _STEP, _TEAMS, _MAX_CHUNK = 288, 64, 4, 16
_PAD, _PART_BYTES, _PIECE_BYTES = 16, 4096, 2 * GROUP * _STEP
_STATIC_BYTES = 7 * 1024
# A team waits for a chunk by the parity of its slot, of which there are 32: the one there before must have arrived by then, and
# has where teams take turns of so many chunks of an expert, and no more are on their way.
_MAX_EXPERT_CHUNKS, _MAX_IN_FLIGHT = 8, 8


@dataclass(frozen=True, slots=True)
class Router:
    """How a sparse layer chooses: the `top_k` largest of norm(s) @ weight.T, weighted by their softmax."""

    weight_EH: torch.Tensor
    top_k: int
    renormalize: bool


@dataclass(frozen=True, slots=True)
class Next:
    """The norm and the query, key and value layer that come next."""

    norm_H: torch.Tensor
    eps: float
    weight_NH: torch.Tensor


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """What a layer has behind its attention; `router` only with several experts."""

    output_HQ: torch.Tensor
    norm_H: torch.Tensor
    eps: float
    gate_up_EUH: torch.Tensor
    down_EHF: torch.Tensor
    activation: str
    router: Router | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """(H, Q, F, E, C)."""
        num_experts, hidden, intermediate = self.down_EHF.shape
        return hidden, self.output_HQ.shape[1], intermediate, num_experts, 1 if self.router is None else self.router.top_k


def separate_layer(
    attended_TQ: torch.Tensor, residual_TH: torch.Tensor, layer: LayerWeights, following: Next | None
) -> tuple[Summands, torch.Tensor]:
    """(y, r) by the other ops; y of the last layer may be unsummed."""
    x_TH, router = linear(attended_TQ, layer.output_HQ), layer.router
    if router is None:
        y_TH, sum_TH = rms_norm(x_TH, layer.norm_H, layer.eps, residual_TH=residual_TH)
        out: Summands = linear(gated_linear(y_TH, layer.gate_up_EUH[0], activation=layer.activation), layer.down_EHF[0])
    else:
        y_TH, sum_TH, weights_TC, experts_TC = norm_and_route(
            x_TH, residual_TH, layer.norm_H, layer.eps, router.weight_EH, router.top_k, renormalize=router.renormalize
        )
        out = moe_mlp(y_TH, layer.gate_up_EUH, layer.down_EHF, weights_TC, experts_TC, layer.activation)
    if following is None:
        return out, sum_TH
    if isinstance(out, torch.Tensor):
        y_TH, sum_TH = rms_norm(out, following.norm_H, following.eps, residual_TH=sum_TH)
    else:
        y_TH, sum_TH = sum_terms_and_norm(out, sum_TH, following.norm_H, following.eps)
    return linear(y_TH, following.weight_NH), sum_TH


def fused_layer(
    attended_TQ: torch.Tensor,
    residual_TH: torch.Tensor,
    layer: LayerWeights,
    following: Next | None,
    *,
    counter: torch.Tensor,
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, r) by one kernel. ValueError where `unfit_reason` has one, or the arguments do not fit the weights.

    `counter`: what `new_counter` answered, of no other calls than these, on one stream.
    """
    num_rows, (hidden, attended_size, intermediate, num_experts, choices) = len(attended_TQ), layer.sizes
    reason = unfit_reason(num_rows, layer, following)
    if reason is not None:
        raise ValueError(f"between_attentions: {reason}")
    for name, tensor, size in (("attended", attended_TQ, attended_size), ("residual", residual_TH, hidden)):
        if tensor.shape != (num_rows, size) or tensor.dtype != layer.down_EHF.dtype or not tensor.is_contiguous():
            raise ValueError(
                f"between_attentions: {name} {tuple(tensor.shape)} {tensor.dtype} must be {(num_rows, size)} "
                f"{layer.down_EHF.dtype}, contiguous"
            )
    if not 0 < config["max_in_flight"] <= _MAX_IN_FLIGHT:
        raise ValueError(f"between_attentions: max_in_flight of {dict(config)} must be 1 to {_MAX_IN_FLIGHT}")
    kernel = _load(layer, following)
    assert kernel is not None  # unfit_reason has loaded it
    out_size = hidden if following is None else following.weight_NH.shape[0]
    sum_TH, new_residual_TH = (torch.empty_like(residual_TH, memory_format=torch.contiguous_format) for _ in range(2))
    gated_PF, y = attended_TQ.new_empty(num_rows * choices, intermediate), attended_TQ.new_empty(num_rows, out_size)
    logits_TE = torch.empty(num_rows, num_experts, dtype=torch.float32, device=y.device)
    memory = plan_memory(num_rows, layer.sizes)
    normed = (
        layer.norm_H,
        layer.router and layer.router.weight_EH,
        *((None, None) if following is None else (following.norm_H, following.weight_NH)),
    )
    tensors = (attended_TQ, residual_TH, *normed, sum_TH, gated_PF, y, new_residual_TH, logits_TE, counter)
    weights = (
        layer.output_HQ,
        layer.gate_up_EUH,
        layer.down_EHF,
        layer.output_HQ if following is None else following.weight_NH,
    )
    maps = [_weight_map(weight, chunk) for weight, chunk in zip(weights, chunks_of(layer.sizes), strict=True)]
    numbers = (
        num_rows,
        int(layer.router is not None and layer.router.renormalize),
        ACTIVATIONS.index(layer.activation),
        memory.ring_bytes,
        memory.x_bytes,
        config["max_in_flight"],
        config["prefetches"],
        int.from_bytes(struct.pack("<2f", layer.eps, 0.0 if following is None else following.eps), "little"),
    )
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    loader.launch(
        kernel,
        (*maps, (ctypes.c_uint64 * (len(addresses) + len(numbers)))(*addresses, *numbers)),
        grid=(_num_ctas(y.device), 1),
        num_threads=_NUM_THREADS,
        shared_bytes=memory.all_bytes,
        early_start=True,
    )
    return y, sum_TH if following is None else new_residual_TH


def new_counter(device: torch.device) -> torch.Tensor:
    """Where the CTAs of a call meet: it must outlive the CUDA graphs that hold calls."""
    return torch.zeros(1, dtype=torch.int64, device=device)


def choose_config(layer: LayerWeights, following: Next, num_rows: int) -> Config | None:
    """The tuned table's for so many rows, where it says that one kernel is faster; else None."""
    weight_NH = following.weight_NH
    if weight_NH.device.type != "cuda" or not 0 < num_rows <= MAX_ROWS or kernel_mode() != "auto":
        return None
    config = tuning.lookup(
        "between_attentions", weight_NH.dtype, (*layer.sizes, weight_NH.shape[0]), num_rows, weight_NH.device
    )
    return config if config is not None and config["kernel"] == "fused" else None


@dataclass(frozen=True, slots=True)
class Memory:
    """Dynamic shared memory of a CTA: chunks of weights, x, sums of tiles and what aligns them."""

    ring_bytes: int
    x_bytes: int
    all_bytes: int

    def holds_chunks(self, sizes: tuple[int, ...]) -> bool:
        """Whether there is room for two chunks of each product, one that is read and one on its way."""
        return self.ring_bytes >= 2 * 2 * max(chunks_of(sizes)) * _PIECE_BYTES


def chunks_of(sizes: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Steps of a chunk of each product of a layer of sizes (H, Q, F, E, C)."""
    hidden, attended_size, intermediate, num_experts, _ = sizes

    def chunk(num_inputs: int, shares: int) -> int:
        num_steps = num_inputs // _STEP
        return next(n for n in range(min(num_steps // shares, _MAX_CHUNK), 0, -1) if num_steps % (shares * n) == 0)

    of_hidden = chunk(hidden, _TEAMS)
    return chunk(attended_size, _TEAMS), of_hidden, chunk(intermediate, _TEAMS if num_experts == 1 else 1), of_hidden


def plan_memory(num_rows: int, sizes: tuple[int, ...]) -> Memory:
    """For x of whole rows and as many chunks of weights as there is room for."""
    hidden, attended_size, intermediate, _, choices = sizes
    products = ((attended_size, num_rows), (hidden, num_rows), (intermediate, num_rows * choices))
    x_bytes = -(-max(rows * (2 * num_inputs + _PAD) for num_inputs, rows in products) // 128) * 128
    all_bytes = loader.CTA_SHARED_BYTES - _STATIC_BYTES
    ring_bytes = (all_bytes - _PIECE_BYTES - x_bytes - 2 * _PART_BYTES) // _PIECE_BYTES * _PIECE_BYTES
    return Memory(ring_bytes=ring_bytes, x_bytes=x_bytes, all_bytes=all_bytes)


def unfit_reason(num_rows: int, layer: LayerWeights, following: Next | None) -> str | None:
    """Why the kernel cannot run on so many rows of these layers, or None. Compiles at the first call."""
    hidden, attended_size, intermediate, num_experts, choices = layer.sizes
    router = layer.router
    weights = [layer.output_HQ, layer.norm_H, layer.gate_up_EUH, layer.down_EHF]
    weights += [router.weight_EH] if router else []
    weights += [following.norm_H, following.weight_NH] if following else []
    dtypes = {weight.dtype for weight in weights}
    limits = (
        (0 < num_rows <= MAX_ROWS, f"{num_rows} rows: it takes 1 to {MAX_ROWS}"),
        (
            layer.output_HQ.shape == (hidden, attended_size)
            and layer.norm_H.shape == (hidden,)
            and layer.gate_up_EUH.shape == (num_experts, 2 * intermediate, hidden)
            and (router is None or router.weight_EH.shape == (num_experts, hidden))
            and (following is None or following.norm_H.shape == (hidden,) == following.weight_NH.shape[1:])
            and (following is None or len(following.weight_NH) % GROUP == 0),
            f"weights {[tuple(weight.shape) for weight in weights]} do not fit",
        ),
        (
            all(size % NORM_STEP == 0 for size in (hidden, attended_size, intermediate)) and hidden <= MAX_HIDDEN,
            f"sizes {hidden}, {attended_size}, {intermediate} are not multiples of {NORM_STEP}, the first up to {MAX_HIDDEN}",
        ),
        (
            num_experts == 1 if router is None else num_experts in EXPERTS and 0 < choices <= min(num_experts, 32),
            f"{choices} of {num_experts} experts: it takes {EXPERTS}",
        ),
        (num_rows * choices <= MAX_PAIRS, f"{num_rows} rows of {choices} choices: it takes {MAX_PAIRS} together"),
        (layer.activation in ACTIVATIONS, f"activation {layer.activation!r}"),
        (dtypes in ({torch.bfloat16}, {torch.float16}), f"weights of {dtypes}: all must be bfloat16 or all float16"),
        (
            all(weight.is_contiguous() and weight.data_ptr() % 16 == 0 for weight in weights),
            "weights with gaps or at odd places",
        ),
    )
    for is_kept, reason in limits:
        if not is_kept:
            return reason
    if num_experts > 1 and intermediate // _STEP > _MAX_EXPERT_CHUNKS * chunks_of(layer.sizes)[2]:
        return (
            f"{intermediate} inputs of an expert do not divide into {_MAX_EXPERT_CHUNKS} chunks of up to {_MAX_CHUNK * _STEP}"
        )
    device = layer.down_EHF.device
    misplaced = loader.misplaced_reason("the layer", device)
    if misplaced is not None:
        return misplaced
    if not plan_memory(num_rows, layer.sizes).holds_chunks(layer.sizes):
        return f"{num_rows} rows of {layer.sizes} leave too little shared memory for weights"
    if _load(layer, following) is None:
        return f"it cannot be compiled: {loader.unavailable_reason()}"
    return None


def _weight_map(weight: torch.Tensor, chunk: int) -> loader.TensorMap:
    """Of a chunk's steps of a group of rows, of a weight whose experts follow one another."""
    num_inputs = weight.shape[-1]
    num_rows, num_steps = weight.numel() // num_inputs, num_inputs // _STEP
    return loader.tensor_map_of(
        weight.data_ptr(), weight.dtype, (num_steps, num_rows, _STEP), (_STEP, num_inputs), (chunk, GROUP, _STEP)
    )


def _num_ctas(device: torch.device) -> int:
    """One an SM: all of them are on the GPU at once."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _load(layer: LayerWeights, following: Next | None) -> loader.Kernel | None:
    hidden, attended_size, intermediate, num_experts, choices = layer.sizes
    macros = (
        ("HIDDEN", hidden),
        ("ATTENDED", attended_size),
        ("INTERMEDIATE", intermediate),
        ("OUT_SIZE", hidden if following is None else following.weight_NH.shape[0]),
        ("EXPERTS", 0 if layer.router is None else num_experts),
        ("CHOICES", choices),
        ("CTAS", _num_ctas(layer.down_EHF.device)),
        ("FLOAT16", int(layer.down_EHF.dtype == torch.float16)),
    )
    return loader.load(SOURCE, macros, layer.down_EHF.device.index)
