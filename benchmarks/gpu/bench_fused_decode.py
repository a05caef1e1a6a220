"""Decode attention with all before it (norms, rotary, store): the fused kernel in every configuration against the two ops.

    python benchmarks/gpu/bench_fused_decode.py [--heads qwen3-8b] [--batch 8] [--context 768]

A JSON row a shape and configuration, the fastest first: microseconds a call, back to back in a CUDA graph over enough caches to
leave the L2, and the rate at which keys and values are read. `two ops` is what serves where the fused kernel does not. A
configuration whose result is off is named on stderr and not timed. With `--between-products` each call stands between the two
products of cuBLAS that surround it in a step of many rows, whose own time is taken off: what is the quickest back to back with
itself need not be so there. Not a test.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bench_attention import HEAD_DIM, HEADS, PAGE_LEN, Inputs, Shape, describe, graph_microseconds
from pilotfish.kernels.attention_config import FusedDecodeConfig, fused_decode_config
from pilotfish.kernels.fused_decode import fused_decode
from pilotfish.kernels.paged_attention import TOLERANCE, paged_attention
from pilotfish.kernels.qkv_prepare import prepare_qkv

SHAPES = [(1, 768), (8, 768), (32, 768), (128, 768), (512, 640), (1, 8192), (8, 8192)]
CONFIGS = [
    FusedDecodeConfig(num_splits=splits, num_warps=warps, num_stages=stages)
    for splits, (warps, stages) in itertools.product((1, 2, 4, 8), ((4, 2), (4, 3), (4, 4), (8, 2), (8, 3), (2, 3), (2, 4)))
]
HIDDEN_SIZES = {"qwen3-8b": 4096, "qwen3-30b-a3b": 2048, "qwen3-0.6b": 1024}


class DecodeInputs(Inputs):
    """With the new token's k and v, which replace the last key."""

    def __init__(self, shape: Shape, *, table_width: int, by_head: bool) -> None:
        super().__init__(shape, table_width=table_width, by_head=by_head)
        num_heads, num_kv_heads = HEADS[shape.model]
        qkv = torch.randn(shape.num_rows, num_heads + 2 * num_kv_heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        self.qkv = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
        angles = torch.rand(shape.context_len, HEAD_DIM // 2, device="cuda")
        self.cos, self.sin = angles.cos(), angles.sin()
        self.positions = self.lens.long() - 1
        pages = self.tables.long()[:, (shape.context_len - 1) // PAGE_LEN]
        self.slots = pages * PAGE_LEN + (shape.context_len - 1) % PAGE_LEN
        self.norms = {"q_norm_D": torch.rand(HEAD_DIM, device="cuda", dtype=torch.bfloat16), "norm_eps": 1e-6}
        self.norms["k_norm_D"] = self.norms["q_norm_D"]

    def run_two_ops(self, copy: int) -> torch.Tensor:
        q, k, v = self.qkv
        k_cache, v_cache = self.caches[copy % len(self.caches)]
        prepare_qkv(q, k, v, self.cos, self.sin, self.positions, k_cache, v_cache, self.slots, **self.norms)
        options = {"scale": HEAD_DIM**-0.5, "max_query_len": 1, "min_query_len": 1}
        return paged_attention(q, k_cache, v_cache, self.tables, self.starts, self.lens, **options)

    def run_fused(self, copy: int, config: FusedDecodeConfig) -> torch.Tensor:
        k_cache, v_cache = self.caches[copy % len(self.caches)]
        options = {"scale": HEAD_DIM**-0.5, "window": None, "sinks_N": None, "config": config}
        arguments = (*self.qkv, self.cos, self.sin, k_cache, v_cache, self.slots, self.tables, self.lens)
        return fused_decode(*arguments, **self.norms, **options)


class Products:
    """The products of cuBLAS before and behind attention, with enough weights to leave the L2."""

    def __init__(self, shape: Shape, num_copies: int) -> None:
        num_heads, num_kv_heads = HEADS[shape.model]
        hidden, width, num_rows = HIDDEN_SIZES[shape.model], num_heads * HEAD_DIM, shape.num_rows
        options = {"device": "cuda", "dtype": torch.bfloat16}
        self.x, self.out = torch.randn(num_rows, hidden, **options), torch.randn(num_rows, width, **options)
        before = (num_copies, width + 2 * num_kv_heads * HEAD_DIM, hidden)
        self.before, self.behind = torch.randn(before, **options), torch.randn(num_copies, hidden, width, **options)
        self.num_copies = num_copies
        self.microseconds = graph_microseconds(lambda copy: self.surround(lambda _: None, copy), num_copies)

    def surround(self, run: Callable[[int], object], copy: int) -> None:
        F.linear(self.x, self.before[copy % self.num_copies])
        run(copy)
        F.linear(self.out, self.behind[copy % self.num_copies])


def measure(shape: Shape, limits: argparse.Namespace) -> list[dict[str, object]]:
    inputs = DecodeInputs(shape, table_width=limits.table_width, by_head=limits.by_head)
    num_kv_heads = HEADS[shape.model][1]
    default = fused_decode_config(num_rows=shape.num_rows, num_kv_heads=num_kv_heads)
    q_before = inputs.qkv[0].clone()  # the two ops turn q in place
    expected = inputs.run_two_ops(0)
    inputs.qkv[0].copy_(q_before)
    rtol, atol = TOLERANCE[expected.dtype]
    products = Products(shape, len(inputs.caches)) if limits.between_products else None

    def time(run: Callable[[int], object]) -> float:
        if products is None:
            return graph_microseconds(run, len(inputs.caches))
        return graph_microseconds(lambda copy: products.surround(run, copy), len(inputs.caches)) - products.microseconds

    rows = []
    for config in dict.fromkeys([default, *CONFIGS]):
        if config.num_splits > 1 and config.num_splits * shape.num_rows * num_kv_heads > 2500:
            continue
        out = inputs.run_fused(0, config)
        if not torch.allclose(out, expected, rtol=rtol, atol=atol):
            print(f"{shape}: {config} is off by up to {(out - expected).abs().max().item():.2e}", file=sys.stderr)
            continue
        microseconds = time(lambda copy, config=config: inputs.run_fused(copy, config))
        row = describe(shape, microseconds, limits) | {"default": config == default}
        rows.append(row | {"config": dataclasses.asdict(config)})
    rows.append(describe(shape, time(inputs.run_two_ops), limits) | {"config": "two ops"})
    return sorted(rows, key=lambda row: row["us"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", choices=HEADS, action="append", help="default: all")
    parser.add_argument("--batch", type=int, action="append", help="only shapes of so many rows")
    parser.add_argument("--context", type=int, action="append", help="only shapes of so many keys a row")
    parser.add_argument("--table-width", type=int, default=2560, help="columns of the block tables, as in a CUDA graph")
    parser.add_argument("--between-products", action="store_true", help="as in a step of many rows")
    parser.add_argument("--by-head", action="store_true", help="a head's keys of a page follow one another")
    parser.add_argument("--bandwidth", type=float, default=4.28, help="the machine's measured read bandwidth, TB/s")
    parser.add_argument("--best", type=int, default=1000, help="print so many rows a shape, and the default and `two ops`")
    arguments = parser.parse_args()
    for model, (num_rows, context_len) in itertools.product(arguments.heads or HEADS, SHAPES):
        if num_rows not in (arguments.batch or [num_rows]) or context_len not in (arguments.context or [context_len]):
            continue
        shape = Shape(model=model, num_rows=num_rows, query_len=1, context_len=context_len)
        for rank, row in enumerate(measure(shape, arguments)):
            if rank < arguments.best or row.get("default") or row["config"] == "two ops":
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
