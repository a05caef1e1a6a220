"""Inputs of paged attention from a few numbers: ragged rows, pages in a random order, q a view of a packed qkv."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Case:
    """rows: (query_len, context_len) of each."""

    rows: tuple[tuple[int, int], ...]
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 16
    page_len: int = 16
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False


def make(case: Case, device="cpu", dtype=torch.float32, *, spare_pages=2):
    """Queries as a view of a packed qkv, caches as views of one tensor, pages in a random order."""
    num_heads, num_kv_heads = case.heads
    num_tokens = sum(query_len for query_len, _ in case.rows)
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, case.head_dim, device=device, dtype=dtype)
    pages = [-(-context_len // case.page_len) for _, context_len in case.rows]
    num_pages, width = sum(pages) + spare_pages, max(pages, default=0) + 1
    cache = torch.randn(num_pages, 2, case.page_len, num_kv_heads, case.head_dim, device=device, dtype=dtype)
    free = torch.randperm(num_pages).tolist()
    tables = torch.zeros(len(case.rows), width, dtype=torch.int32)
    for row, count in enumerate(pages):
        tables[row, :count] = torch.tensor([free.pop() for _ in range(count)])
    starts = torch.tensor([0] + [query_len for query_len, _ in case.rows]).cumsum(0)
    tensors = (
        qkv[:, :num_heads],
        cache[:, 0],
        cache[:, 1],
        tables.to(device),
        starts.to(device=device, dtype=torch.int32),
        torch.tensor([context_len for _, context_len in case.rows], dtype=torch.int32, device=device),
    )
    options = {
        "max_query_len": max((query_len for query_len, _ in case.rows), default=0),
        "scale": case.head_dim**-0.5,
        "window": case.window,
        "soft_cap": case.soft_cap,
        "sinks_N": torch.randn(num_heads, device=device) if case.sinks else None,
    }
    return tensors, options
