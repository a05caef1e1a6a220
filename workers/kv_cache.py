"""The paged KV cache: one pair of tensors a layer, a page a block.

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
    """What one block is: of this rank, over all its layers."""

    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_block(self) -> int:
        """Keys and values."""
        return 2 * self.num_layers * self.block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class KvCache:
    """`layers[i]` is (keys_PLKD, values_PLKD) of layer i."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    num_blocks: int
    block_size: int

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for pair in self.layers for tensor in pair)


def allocate_kv_cache(layout: KvLayout, *, num_blocks: int, device: torch.device) -> KvCache:
    """A zeroed cache. On a CPU a page takes memory when it is first written."""
    shape = (num_blocks + 1, layout.block_size, layout.num_kv_heads, layout.head_dim)
    zeros = _untouched_zeros if device.type == "cpu" else partial(torch.zeros, device=device)
    layers = tuple((zeros(shape, dtype=layout.dtype), zeros(shape, dtype=layout.dtype)) for _ in range(layout.num_layers))
    return KvCache(layers, num_blocks, layout.block_size)


def _untouched_zeros(shape: tuple[int, ...], *, dtype: torch.dtype) -> torch.Tensor:
    """Zeros from the operating system. (torch.zeros writes them, which takes seconds a gigabyte and all of the memory.)"""
    return torch.frombuffer(mmap.mmap(-1, prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
