"""The paged KV cache: one pair of tensors a layer, a page a block.

Block ids of the scheduler are page numbers, from 1; page 0 is scratch that padding may point at. The tensors live as long
as the engine. What a page holds is the scheduler's business.

Shape letters: P pages (num_blocks + 1), L tokens a page (block_size), K key-value heads, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class KvCache:
    """`layers[i]` is (keys_PLKD, values_PLKD) of layer i."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    num_blocks: int
    block_size: int

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for pair in self.layers for tensor in pair)


def allocate_kv_cache(
    *,
    num_blocks: int,
    block_size: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KvCache:
    """A zeroed cache. On a CPU the pages take memory when they are first written."""
    shape = (num_blocks + 1, block_size, num_kv_heads, head_dim)
    layers = tuple(
        (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
        for _ in range(num_layers)
    )
    return KvCache(layers, num_blocks, block_size)


def bytes_per_block(*, block_size: int, num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    return 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize
