"""Paged attention on this GPU against a naive gather, as fractions of its limit: `python benchmarks/gpu/bench_attention.py`.

One JSON row a shape: microseconds a call (median of replays of a CUDA graph; caches rotate past the L2), TB/s of keys and
values read and their fraction of --bandwidth for decode, TFLOP/s of what the causal mask leaves and their fraction of --flops
for prefill, for which `triton_us` is Triton's kernel. The baseline gathers the pages with an index and calls
F.scaled_dot_product_attention.
`--sweep-prefill` and `--sweep-decode` time launch parameters instead, the best of each shape first: what
kernels/attention_config.py should say. Prefill is compared with F.scaled_dot_product_attention on contiguous tensors. Results
are checked before they are timed; candidates are compiled first, by several processes. Each takes less than a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from pilotfish.kernels.attention_config import (
    SPECIALIZED_PREFILL_CONFIGS,
    DecodeConfig,
    PrefillConfig,
    SpecializedPrefillConfig,
    decode_config,
    prefill_config,
    specialized_prefill_config,
)
from pilotfish.kernels.decode_attention import decode_attention
from pilotfish.kernels.paged_attention import TOLERANCE, paged_attention
from pilotfish.kernels.prefill_attention import prefill_attention
from pilotfish.kernels.specialized_prefill import specialized_prefill, unfit_reason
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

PAGE_LEN, HEAD_DIM, ELEMENT_BYTES = 16, 128, 2
HEADS = {"qwen3-8b": (32, 8), "qwen3-30b-a3b": (32, 4), "qwen3-0.6b": (16, 8)}
DECODE_SHAPES = [(1, 768), (8, 768), (32, 768), (128, 768), (1, 8192), (8, 8192), (1, 32768), (8, 32768)]
# (rows, new tokens, keys of each): prompts, and pieces of long ones
PREFILL_SHAPES = [
    (128, 64, 64),
    (64, 128, 128),
    (16, 512, 512),
    (4, 2048, 2048),
    (1, 8192, 8192),
    (16, 512, 2048),
    (1, 8192, 32768),
]
# (rows, keys) of the sweeps
SWEPT_DECODE_SHAPES = [(1, 768), (8, 768), (32, 768), (128, 768), (512, 640)]
SWEPT_PREFILL_SHAPES = [(16, 512), (4, 4096), (1, 16384)]
ROTATED_BYTES = 2**31
Config = DecodeConfig | PrefillConfig | SpecializedPrefillConfig
OPTIONS = {"scale": HEAD_DIM**-0.5, "window": None, "soft_cap": None, "sinks_N": None}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """`num_rows` rows of `query_len` new tokens and `context_len` keys each."""

    model: str
    num_rows: int
    query_len: int
    context_len: int

    @property
    def cache_bytes(self) -> int:
        return self.num_rows * self.context_len * HEADS[self.model][1] * HEAD_DIM * 2 * ELEMENT_BYTES

    @property
    def flops(self) -> int:
        pairs = self.query_len * self.context_len - self.query_len * (self.query_len - 1) // 2
        return 4 * self.num_rows * pairs * HEADS[self.model][0] * HEAD_DIM


class Inputs:
    """Random tensors of one shape: enough copies of the caches to leave the L2 between two calls on one of them."""

    def __init__(self, shape: Shape, *, table_width: int, by_head: bool = False) -> None:
        num_heads, num_kv_heads = HEADS[shape.model]
        self.shape = shape
        self.pages_a_row = -(-shape.context_len // PAGE_LEN)
        num_pages = shape.num_rows * self.pages_a_row
        cache_shape = (
            (2, num_pages, num_kv_heads, PAGE_LEN, HEAD_DIM) if by_head else (2, num_pages, PAGE_LEN, num_kv_heads, HEAD_DIM)
        )
        num_copies = -(-ROTATED_BYTES // shape.cache_bytes)
        caches = [torch.randn(cache_shape, device="cuda", dtype=torch.bfloat16) for _ in range(num_copies)]
        self.caches = [cache.transpose(2, 3) if by_head else cache for cache in caches]
        num_tokens = shape.num_rows * shape.query_len
        qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        self.q = qkv[:, :num_heads]
        width = max(table_width, self.pages_a_row)
        self.tables = torch.zeros(shape.num_rows, width, dtype=torch.int32, device="cuda")
        pages = torch.randperm(num_pages, device="cuda").int()
        self.tables[:, : self.pages_a_row] = pages.view(shape.num_rows, self.pages_a_row)
        self.starts = torch.arange(shape.num_rows + 1, dtype=torch.int32, device="cuda") * shape.query_len
        self.lens = torch.full((shape.num_rows,), shape.context_len, dtype=torch.int32, device="cuda")

    def arguments(self, copy: int) -> tuple[torch.Tensor, ...]:
        return (self.q, *self.caches[copy % len(self.caches)], self.tables, self.starts, self.lens)

    def run(self, copy: int) -> torch.Tensor:
        options = OPTIONS | {"max_query_len": self.shape.query_len, "min_query_len": self.shape.query_len}
        return paged_attention(*self.arguments(copy), **options)

    def run_configured(self, copy: int, config: Config) -> torch.Tensor:
        out = torch.empty_like(self.q, memory_format=torch.contiguous_format)
        if isinstance(config, DecodeConfig):
            decode_attention(out, *self.arguments(copy), config=config, **OPTIONS)
        elif isinstance(config, SpecializedPrefillConfig):
            arguments = self.arguments(copy)
            specialized_prefill(out, *arguments, config=config, skip_one_query=False, scale=OPTIONS["scale"])
        else:
            prefill_attention(out, *self.arguments(copy), config=config, skip_one_query=False, **OPTIONS)
        return out

    def run_tritons(self, copy: int) -> torch.Tensor:
        return self.run_configured(copy, default_config(self, triton_only=True))

    def contiguous(self, copy: int) -> tuple[torch.Tensor, ...]:
        """q, k and v as [rows, heads, tokens, head_dim]."""
        tables = self.tables[:, : self.pages_a_row]
        k, v = (cache[tables].flatten(1, 2).transpose(1, 2) for cache in self.caches[copy % len(self.caches)])
        return self.q.view(self.shape.num_rows, self.shape.query_len, *self.q.shape[1:]).transpose(1, 2), k, v

    def gather(self, copy: int) -> torch.Tensor:
        """The baseline: [rows, heads, query, head_dim]."""
        return self.dense(self.contiguous(copy))

    def dense(self, qkv: Sequence[torch.Tensor]) -> torch.Tensor:
        query_len, context_len = self.shape.query_len, self.shape.context_len
        options: dict[str, object] = {"scale": OPTIONS["scale"], "enable_gqa": True}
        if 1 < query_len < context_len:
            options["attn_mask"] = causal_lower_right(query_len, context_len)
        else:
            options["is_causal"] = query_len > 1
        return F.scaled_dot_product_attention(*qkv, **options)


def graph_microseconds(run: Callable[[int], object], num_copies: int) -> float:
    """Median over replays of a graph of several calls, each on the next copy of the caches."""
    num_calls = -(-8 // num_copies) * num_copies
    for copy in range(2):
        run(copy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(num_calls):
            run(copy)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(12)]
    graph.replay()
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    replays_ms = [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]
    return statistics.median(replays_ms) * 1e3 / num_calls


def describe(shape: Shape, microseconds: float, limits: argparse.Namespace) -> dict[str, object]:
    row: dict[str, object] = {
        "op": "decode" if shape.query_len == 1 else "prefill",
        "heads": shape.model,
        "batch": shape.num_rows,
        "tokens": shape.query_len,
        "context": shape.context_len,
        "us": round(microseconds, 2),
    }
    if shape.query_len == 1:
        rate = shape.cache_bytes / microseconds / 1e6
        return row | {"tb_s": round(rate, 3), "of_limit": round(rate / limits.bandwidth, 3)}
    rate = shape.flops / microseconds / 1e6
    return row | {"tflop_s": round(rate, 1), "of_limit": round(rate / limits.flops, 3)}


def default_config(inputs: Inputs, *, triton_only: bool = False) -> Config:
    """What `paged_attention` takes; with `triton_only` among Triton's kernels."""
    num_heads, num_kv_heads = HEADS[inputs.shape.model]
    shape = {"group": num_heads // num_kv_heads, "head_dim": HEAD_DIM, "element_bytes": ELEMENT_BYTES}
    if inputs.shape.query_len > 1:
        specialized = specialized_prefill_config()
        serves = not triton_only and unfit_reason(inputs.q, *inputs.caches[0], config=specialized) is None
        return specialized if serves else prefill_config(**shape)
    max_keys = inputs.tables.shape[1] * PAGE_LEN
    return decode_config(num_rows=inputs.shape.num_rows, num_kv_heads=num_kv_heads, max_keys=max_keys, **shape)


def prefill_candidates() -> list[Config]:
    """Those in CUDA C++. Of Triton's: one program a multiprocessor with all its registers, two of 128 a thread, or few rows."""
    one = [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 4)]
    two = [(128, 64, 8, 2, False, 128), (128, 64, 8, 2, True, 128), (128, 32, 8, 4, True, 128), (128, 64, 8, 1, True, 128)]
    others = [(64, 64, 4, 3), (256, 64, 16, 3, False), (256, 32, 16, 4)]
    names = [field.name for field in dataclasses.fields(PrefillConfig)]
    tritons = [PrefillConfig(**dict(zip(names, values, strict=False))) for values in one + two + others]
    return [*SPECIALIZED_PREFILL_CONFIGS, *tritons]


def decode_candidates(shape: Shape) -> Iterator[DecodeConfig]:
    """The numbers of splits that give half a program to eight a multiprocessor, times the tile and the loads ahead."""
    tiles = ((64, 4, 3), (64, 4, 4), (64, 4, 5), (64, 8, 4), (32, 4, 5), (128, 4, 3), (128, 8, 3))  # keys, warps, stages
    num_results = shape.num_rows * HEADS[shape.model][1]
    most_splits = -(-shape.context_len // 32)
    splits = sorted({min(max(programs // num_results, 1), most_splits) for programs in (66, 99, 132, 264, 396, 528, 792, 1056)})
    for num_splits, (block_j, num_warps, num_stages) in itertools.product(splits, tiles):
        yield DecodeConfig(num_splits=num_splits, block_j=block_j, num_warps=num_warps, num_stages=num_stages)


def candidates(shape: Shape) -> list[Config]:
    return list(decode_candidates(shape)) if shape.query_len == 1 else prefill_candidates()


def run_candidate(inputs: Inputs, config: Config) -> torch.Tensor | None:
    """The result; None where this GPU has too little shared memory or registers for it."""
    try:
        return inputs.run_configured(0, config)
    except triton.runtime.errors.OutOfResources:
        return None


def compile_candidates(jobs: Sequence[tuple[Shape, Config]]) -> None:
    """Into Triton's cache on disk. What the shape changes in the code is in the model and in whether there is one split."""
    inputs: dict[str, Inputs] = {}
    for shape, config in jobs:
        if shape.model not in inputs:
            small = dataclasses.replace(shape, num_rows=1, query_len=min(shape.query_len, 512), context_len=512)
            inputs[shape.model] = Inputs(small, table_width=0)
        run_candidate(inputs[shape.model], config)


def compile_all(shapes: Sequence[Shape], num_processes: int = 8) -> None:
    variants = {}
    for shape, config in [(swept, config) for swept in shapes for config in candidates(swept)]:
        is_split = isinstance(config, DecodeConfig) and config.num_splits > 1
        compiled = dataclasses.replace(config, num_splits=2) if is_split else config
        variants[shape.model, compiled] = (shape, compiled)
    jobs = list(variants.values())
    num_processes = min(num_processes, os.cpu_count() or 1)
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_candidates, [jobs[i::num_processes] for i in range(num_processes)]))


def dense_limit(inputs: Inputs) -> dict[str, object]:
    """TFLOP/s of torch's attention on contiguous tensors, by the fastest of its backends."""
    q, k, v = (tensor.contiguous() for tensor in inputs.contiguous(0))
    best = {"sdpa_tflop_s": 0.0, "sdpa": "none"}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                microseconds = graph_microseconds(lambda _: inputs.dense((q, k, v)), 1)
        except RuntimeError as error:
            print(f"{backend.name}: {error}", file=sys.stderr)
            continue
        rate = round(inputs.shape.flops / microseconds / 1e6, 1)
        best = max(best, {"sdpa_tflop_s": rate, "sdpa": backend.name}, key=lambda row: row["sdpa_tflop_s"])
    return best


def sweep(shape: Shape, limits: argparse.Namespace) -> None:
    """A row a candidate, the fastest first; one that is wrong is named on stderr and not timed."""
    inputs = Inputs(shape, table_width=limits.table_width if shape.query_len == 1 else 0)
    expected = inputs.gather(0).transpose(1, 2).flatten(0, 1)
    dense = dense_limit(inputs) if shape.query_len > 1 else {}
    default = default_config(inputs)
    rows = []
    for config in dict.fromkeys([default, *candidates(shape)]):
        out = run_candidate(inputs, config)
        if out is None:
            continue
        rtol, atol = TOLERANCE[out.dtype]
        if not torch.allclose(out, expected, rtol=rtol, atol=atol):
            print(f"{shape}: {config} is off by up to {(out - expected).abs().max().item():.2e}", file=sys.stderr)
            continue
        microseconds = graph_microseconds(lambda copy, config=config: inputs.run_configured(copy, config), len(inputs.caches))
        row = describe(shape, microseconds, limits) | dense | {"default": config == default}
        rows.append(row | {"config": dataclasses.asdict(config)})
    for row in sorted(rows, key=lambda row: row["us"]):
        print(json.dumps(row), flush=True)


def sweep_all(arguments: argparse.Namespace) -> None:
    # The prefill of other models differs in the number of programs alone.
    models = arguments.heads or (list(HEADS) if arguments.sweep_decode else ["qwen3-8b"])
    swept = [(rows, 1, keys) for rows, keys in SWEPT_DECODE_SHAPES if arguments.sweep_decode]
    swept += [(rows, keys, keys) for rows, keys in SWEPT_PREFILL_SHAPES if arguments.sweep_prefill]
    shapes = [
        Shape(model=model, num_rows=num_rows, query_len=query_len, context_len=context_len)
        for model, (num_rows, query_len, context_len) in itertools.product(models, swept)
    ]
    compile_all(shapes)
    for shape in shapes:
        sweep(shape, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", choices=HEADS, action="append", help="default: all")
    parser.add_argument("--only", choices=["decode", "prefill"])
    parser.add_argument("--batch", type=int, action="append", help="only shapes of so many rows")
    parser.add_argument("--context", type=int, action="append", help="only shapes of so many keys a row")
    parser.add_argument("--table-width", type=int, default=2560, help="columns of decode block tables, as in a CUDA graph")
    parser.add_argument("--bandwidth", type=float, default=4.28, help="the machine's measured read bandwidth, TB/s")
    parser.add_argument("--flops", type=float, default=790.0, help="the machine's measured bf16 matrix rate, TFLOP/s")
    parser.add_argument("--sweep-prefill", action="store_true", help="by default of qwen3-8b's heads")
    parser.add_argument("--sweep-decode", action="store_true")
    arguments = parser.parse_args()
    if arguments.sweep_prefill or arguments.sweep_decode:
        sweep_all(arguments)
        return
    decode = [(num_rows, 1, context_len) for num_rows, context_len in DECODE_SHAPES] if arguments.only != "prefill" else []
    prefill = PREFILL_SHAPES if arguments.only != "decode" else []
    for model in arguments.heads or HEADS:
        for num_rows, query_len, context_len in decode + prefill:
            if num_rows not in (arguments.batch or [num_rows]) or context_len not in (arguments.context or [context_len]):
                continue
            shape = Shape(model=model, num_rows=num_rows, query_len=query_len, context_len=context_len)
            inputs = Inputs(shape, table_width=arguments.table_width if query_len == 1 else 0)
            microseconds = graph_microseconds(inputs.run, len(inputs.caches))
            baseline = graph_microseconds(inputs.gather, len(inputs.caches))
            row = describe(shape, microseconds, arguments)
            row |= {"gather_us": round(baseline, 2), "speedup": round(baseline / microseconds, 2)}
            if query_len > 1:
                row["triton_us"] = round(graph_microseconds(inputs.run_tritons, len(inputs.caches)), 2)
            print(json.dumps(row | {"config": dataclasses.asdict(default_config(inputs))}), flush=True)


if __name__ == "__main__":
    main()
