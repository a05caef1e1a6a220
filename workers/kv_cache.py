"""The paged KV cache: one pair of tensors a layer, or one tensor where values are numbers of the keys; a page a block.

Block ids of the scheduler are page numbers, from 1; page 0 is scratch that padding may point at. The tensors live as long
as the engine. What a page holds is the scheduler's business.

Shape letters: P pages (num_blocks + 1), L tokens a page (block_size), K key-value heads, D head dimension.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from functools import partial
from math import prod

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class KvLayout:
    """What one block is: of this rank, over all its layers.

    Attributes:
        values_in_keys: a layer has one tensor, for its values are the first numbers of its keys (latent attention).
    """

    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    values_in_keys: bool = False

    @property
    def bytes_per_block(self) -> int:
        """Keys and values."""
        num_tensors = self.num_layers if self.values_in_keys else 2 * self.num_layers
        return num_tensors * self.block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class KvCache:
    """`layers[i]` is (keys_PLKD, values_PLKD) of layer i, twice the same tensor where values are numbers of the keys."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    num_blocks: int
    block_size: int

    @property
    def num_bytes(self) -> int:
        return sum(keys.nbytes + (0 if values is keys else values.nbytes) for keys, values in self.layers)


def allocate_kv_cache(layout: KvLayout, *, num_blocks: int, device: torch.device) -> KvCache:
    """A zeroed cache. On a CPU a page takes memory when it is first written."""
    shape = (num_blocks + 1, layout.block_size, layout.num_kv_heads, layout.head_dim)
    zeros = _untouched_zeros if device.type == "cpu" else partial(torch.zeros, device=device)
    keys = [zeros(shape, dtype=layout.dtype) for _ in range(layout.num_layers)]
    layers = tuple((layer, layer if layout.values_in_keys else zeros(shape, dtype=layout.dtype)) for layer in keys)
    return KvCache(layers, num_blocks, layout.block_size)


def _untouched_zeros(shape: tuple[int, ...], *, dtype: torch.dtype) -> torch.Tensor:
    """Zeros from the operating system. (torch.zeros writes them, which takes seconds a gigabyte and all of the memory.)"""
    return torch.frombuffer(mmap.mmap(-1, prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
