"""Which kernel, cut how, serves the two GEMMs of a mixture-of-experts layer: from the tuned table, else by rule.

The table's ops are "moe_gate_up" and "moe_down", its sizes (E, C, H, F), its rows tokens; a config holds "kernel", a name of
KERNELS, and the fields of its class. T tokens, C choices a token, E experts, H hidden, F intermediate.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton

from . import tuning
from .clamped_gate import ClampedGate
from .dispatch import kernel_mode
from .gated_activation import Activation
from .grouped_tiles import GroupedConfig
from .moe_gemv import GemvConfig
from .streaming_experts import StreamingConfig
from .streaming_experts import serves as streaming_serves
from .tall_experts import TallConfig
from .tall_experts import serves as tall_serves

MAX_GEMV_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class MoeSizes:
    num_tokens: int
    num_choices: int
    num_experts: int
    hidden: int
    intermediate: int

    @property
    def key(self) -> tuple[int, int, int, int]:
        """Of the tuned table."""
        return self.num_experts, self.num_choices, self.hidden, self.intermediate


MoeConfig = GemvConfig | GroupedConfig | StreamingConfig | TallConfig
KERNELS: dict[str, type[MoeConfig]] = {
    "gemv": GemvConfig,
    "grouped": GroupedConfig,
    "streaming": StreamingConfig,
    "tall": TallConfig,
}


def is_plain(activation: Activation | None, bias: torch.Tensor | None) -> bool:
    """Whether a product is one that every kernel serves: without a bias or a clamped gate, which only those of Triton know."""
    return bias is None and not isinstance(activation, ClampedGate)


def choose_config(op: str, sizes: MoeSizes, x: torch.Tensor, weight_EUK: torch.Tensor, *, plain: bool = True) -> MoeConfig:
    """Of op "moe_gate_up" or "moe_down" for x of its dtype and device. The rule's where the table's kernel cannot serve.

    `plain` as is_plain says. With PILOTFISH_KERNELS=invariant it is one for every number of tokens.
    """
    if kernel_mode() == "invariant":
        return _grouped_rule(
            replace(sizes, num_tokens=64 * sizes.num_experts, num_choices=1), x.element_size(), block_n=_block_n(op)
        )
    if x.device.type == "cuda":  # the interpreter has no table
        measured = tuning.lookup(op, x.dtype, sizes.key, sizes.num_tokens, x.device)
        config = None if measured is None else parse_config(measured)
        if config is not None and _serves(config, weight_EUK, x.dtype, gated=op == "moe_gate_up", plain=plain):
            return config
    return rule(op, sizes, element_size=x.element_size())


def _serves(config: MoeConfig, weight_EUK: torch.Tensor, dtype: torch.dtype, *, gated: bool, plain: bool) -> bool:
    """Whether a kernel of CUDA C++ can run here; those of Triton can everywhere."""
    if not plain:
        return not isinstance(config, StreamingConfig | TallConfig)
    if isinstance(config, StreamingConfig):
        return streaming_serves(config, weight_EUK, dtype, gated=gated)
    return not isinstance(config, TallConfig) or tall_serves(config, weight_EUK, dtype, gated=gated)


def rule(op: str, sizes: MoeSizes, *, element_size: int) -> MoeConfig:
    """What serves shapes that the table has not."""
    if sizes.num_tokens > MAX_GEMV_TOKENS:
        return _grouped_rule(sizes, element_size, block_n=_block_n(op))
    if op == "moe_gate_up":
        return GemvConfig(block_n=2, block_k=gemv_block_k(sizes.hidden, most=2048), num_warps=8)
    return GemvConfig(block_n=2, block_k=gemv_block_k(sizes.intermediate, most=256), num_warps=8)


def gemv_block_k(num_inputs: int, *, most: int) -> int:
    """A power of two, at most `most` (from 256 on): the largest that divides `num_inputs`.

    Steps of less than 128 would leave threads without work: then that which leaves the fewest of the last step's idle.
    """
    divisor = num_inputs & -num_inputs
    if divisor >= 128:
        return min(divisor, most)
    block = min((block for block in (2048, 1024, 512, 256) if block <= most), key=lambda block: -num_inputs % block)
    return min(block, triton.next_power_of_2(num_inputs))


def table_config(config: MoeConfig) -> tuning.Config:
    """The config as the tuned table keeps it; parse_config undoes it."""
    (kernel,) = (name for name, kind in KERNELS.items() if isinstance(config, kind))
    return {"kernel": kernel, **asdict(config)}


def parse_config(config: tuning.Config) -> MoeConfig:
    """ValueError where the config's kernel is not known."""
    fields: dict[str, Any] = dict(config)
    kernel = fields.pop("kernel", None)
    if kernel not in KERNELS:
        raise ValueError(f"moe: kernel {kernel!r} of the tuned table is not known: write it anew with pilotfish.kernels.tune")
    return KERNELS[kernel](**fields)


def _block_n(op: str) -> int:
    """Of short tiles."""
    return 32 if op == "moe_gate_up" else 64


def _grouped_rule(sizes: MoeSizes, element_size: int, *, block_n: int) -> GroupedConfig:
    """Tiles as tall as an expert's average share. Short ones wait for memory: many bytes in flight; tall ones for tensor cores.

    `block_n` of the short ones.
    """
    average = triton.cdiv(sizes.num_tokens * sizes.num_choices, sizes.num_experts)
    if element_size > 2:
        block_m = min(max(triton.next_power_of_2(average), 16), 32)
        return GroupedConfig(block_m=block_m, block_n=32, block_k=32, num_warps=4, num_stages=3)
    block_m = min(max(triton.next_power_of_2(average), 16), 128)
    if block_m <= 32:
        return GroupedConfig(block_m=block_m, block_n=block_n, block_k=128, num_warps=4, num_stages=4, prefetch_lines=4)
    if block_m == 64:
        return GroupedConfig(block_m=block_m, block_n=2 * block_n, block_k=64, num_warps=4, num_stages=4)
    return GroupedConfig(block_m=block_m, block_n=4 * block_n, block_k=64, num_warps=8, num_stages=4)
