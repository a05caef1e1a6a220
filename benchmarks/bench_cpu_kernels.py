"""The C++ kernels against torch on this machine, shape by shape, in one run: `python benchmarks/bench_cpu_kernels.py`.

Each figure is the best of several repetitions (other programs only ever add time) for all layers of the model together. The
shapes are those of SmolLM2-135M; weights and caches are the layers' own, so they come from memory as they do in a model.
`torch_*` columns are torch's own functions on contiguous tensors; `reference` is the op's definition in torch.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pilotfish.kernels.gated_activation import gated_activation, gated_activation_ref
from pilotfish.kernels.linear import linear
from pilotfish.kernels.logprobs import gather_logprobs, gather_logprobs_ref
from pilotfish.kernels.moe_mlp import moe_mlp, moe_mlp_ref
from pilotfish.kernels.moe_routing import route_tokens
from pilotfish.kernels.paged_attention import paged_attention
from pilotfish.kernels.rms_norm import rms_norm, rms_norm_ref
from pilotfish.kernels.rotary import apply_rotary, apply_rotary_ref
from pilotfish.kernels.sampling import sample, sample_ref
from pilotfish.kernels.store_kv import store_kv, store_kv_ref

NUM_LAYERS, HIDDEN, INTERMEDIATE, VOCAB = 30, 576, 1536, 49152
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_LEN = 9, 3, 64, 16
PACKED_HEADS = NUM_HEADS + 2 * NUM_KV_HEADS
LAYER_SHAPES = [
    (PACKED_HEADS * HEAD_DIM, HIDDEN),
    (HIDDEN, NUM_HEADS * HEAD_DIM),
    (2 * INTERMEDIATE, HIDDEN),
    (HIDDEN, INTERMEDIATE),
]


def best_ms(run: Callable[[], object], budget_s: float) -> float:
    """At least three repetitions, and as many as the time allows."""
    best, repetitions, begin = float("inf"), 0, time.perf_counter()
    while repetitions < 3 or time.perf_counter() - begin < budget_s:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        repetitions += 1
    return best * 1e3


def report(name: str, **runs: Callable[[], object]) -> None:
    figures = {label: best_ms(run, budget_s=0.5) for label, run in runs.items()}
    print(f"{name:<42}" + "  ".join(f"{label} {ms:9.3f} ms" for label, ms in figures.items()), flush=True)


def each_layer(run: Callable[[int], object]) -> None:
    for layer in range(NUM_LAYERS):
        run(layer)


def bench_linear() -> None:
    bf16 = [[torch.randn(shape).bfloat16() for shape in LAYER_SHAPES] for _ in range(NUM_LAYERS)]
    f32 = [[weight.float() for weight in layer] for layer in bf16]
    head = torch.randn(VOCAB, HIDDEN).bfloat16()
    wide_head = head.float()

    def layers(op: Callable[..., torch.Tensor], weights: list[list[torch.Tensor]], inputs: list[torch.Tensor]) -> None:
        for layer in weights:
            for x, weight in zip(inputs, layer, strict=True):
                op(x, weight)

    for num_tokens in (1, 2, 4, 8, 16, 32, 64, 256):
        inputs = [torch.randn(num_tokens, columns) for _, columns in LAYER_SHAPES]
        narrow = [x.bfloat16() for x in inputs]
        report(
            f"linear, {num_tokens} tokens",
            torch_f32=lambda inputs=inputs: layers(F.linear, f32, inputs),
            torch_bf16=lambda narrow=narrow: layers(F.linear, bf16, narrow),
            ours_f32=lambda inputs=inputs: layers(linear, f32, inputs),
            ours_bf16_weights=lambda inputs=inputs: layers(linear, bf16, inputs),
        )
        report(
            f"LM head, {num_tokens} tokens",
            torch_f32=lambda x=inputs[0]: F.linear(x, wide_head),
            torch_bf16=lambda x=narrow[0]: F.linear(x, head),
            ours_f32=lambda x=inputs[0]: linear(x, wide_head),
            ours_bf16_weights=lambda x=inputs[0]: linear(x, head),
        )


def bench_attention() -> None:
    """torch_sdpa runs row by row on keys and values that are already contiguous, a kv head's query heads together."""
    for name, rows in {
        "decode, 1 row of 300": [(1, 300)],
        "decode, 1 row of 4000": [(1, 4000)],
        "decode, 16 rows of 300": [(1, 300)] * 16,
        "decode, 16 rows of 1500": [(1, 1500)] * 16,
        "prefill of 256": [(256, 256)],
        "prefill of 2048": [(2048, 2048)],
        "16 decode rows and a prefill of 256": [(1, 300)] * 16 + [(256, 256)],
    }.items():
        width = max(-(-context // PAGE_LEN) for _, context in rows)
        shape = (len(rows) * width, PAGE_LEN, NUM_KV_HEADS, HEAD_DIM)
        caches = [(torch.randn(shape), torch.randn(shape)) for _ in range(NUM_LAYERS)]
        tables = torch.randperm(shape[0]).int().view(len(rows), width)
        query_lens = torch.tensor([query_len for query_len, _ in rows])
        starts = F.pad(query_lens.cumsum(0), (1, 0)).int()
        lens = torch.tensor([context for _, context in rows], dtype=torch.int32)
        q = torch.randn(int(query_lens.sum()), NUM_HEADS, HEAD_DIM)
        dense = [
            (torch.randn(1, NUM_HEADS, query_len, HEAD_DIM), *torch.randn(2, 1, NUM_KV_HEADS, context, HEAD_DIM))
            for query_len, context in rows
        ]

        def ours(layer: int, q=q, caches=caches, tables=tables, starts=starts, lens=lens) -> None:
            longest = int(starts.diff().max())
            paged_attention(q, *caches[layer], tables, starts, lens, max_query_len=longest, scale=HEAD_DIM**-0.5)

        def sdpa(_: int, dense=dense) -> None:
            for row_q, row_k, row_v in dense:
                is_causal = row_q.shape[2] > 1
                F.scaled_dot_product_attention(row_q, row_k, row_v, is_causal=is_causal, enable_gqa=True)

        report(f"attention, {name}", torch_sdpa=lambda f=sdpa: each_layer(f), ours=lambda f=ours: each_layer(f))


def bench_small_ops() -> None:
    for num_tokens in (1, 16, 256):
        x, residual = torch.randn(2, num_tokens, HIDDEN)
        norm_weight = torch.randn(HIDDEN).bfloat16()
        gate_up = torch.randn(num_tokens, 2 * INTERMEDIATE)
        heads = (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)
        q, k, v = torch.randn(num_tokens, PACKED_HEADS, HEAD_DIM).split(heads, dim=1)
        rotary = (*torch.randn(2, 512, HEAD_DIM // 2), torch.arange(num_tokens))
        cache = torch.zeros(2, 32, PAGE_LEN, NUM_KV_HEADS, HEAD_DIM)
        slots = torch.randperm(512)[:num_tokens]
        for name, op, reference in (
            ("norm with residual", rms_norm, rms_norm_ref),
            ("rotary", apply_rotary, apply_rotary_ref),
            ("gated activation", gated_activation, gated_activation_ref),
            ("KV store", store_kv, store_kv_ref),
        ):
            arguments, keywords = {
                "norm with residual": ((x, norm_weight, 1e-5), {"residual_TH": residual}),
                "rotary": ((q, k, *rotary), {}),
                "gated activation": ((gate_up, "silu"), {}),
                "KV store": ((k, v, *cache, slots), {}),
            }[name]
            report(
                f"{name}, {num_tokens} tokens",
                reference=lambda f=reference, a=arguments, kw=keywords: each_layer(lambda _: f(*a, **kw)),
                ours=lambda f=op, a=arguments, kw=keywords: each_layer(lambda _: f(*a, **kw)),
            )


def bench_sampling() -> None:
    num_rows = 16
    logits = torch.randn(num_rows, VOCAB) * 2.5
    for name, (temperature, top_k, top_p, min_p) in {
        "greedy": (0.0, 0, 1.0, 0.0),
        "temperature 1": (1.0, 0, 1.0, 0.0),
        "top_k 50": (1.0, 50, 1.0, 0.0),
        "top_p 0.9": (1.0, 0, 0.9, 0.0),
        "top_k 50, top_p 0.9, min_p 0.05": (1.0, 50, 0.9, 0.05),
    }.items():
        keywords = {
            "temperature_M": torch.full((num_rows,), temperature),
            "top_k_M": torch.full((num_rows,), top_k, dtype=torch.int32),
            "top_p_M": torch.full((num_rows,), top_p),
            "min_p_M": torch.full((num_rows,), min_p),
            "seeds_M": torch.arange(num_rows),
            "slots_S": torch.arange(num_rows),
            "positions_S": torch.arange(num_rows),
        }
        report(
            f"sampling 16 rows, {name}",
            reference=lambda keywords=keywords: sample_ref(logits, **keywords),
            ours=lambda keywords=keywords: sample(logits, **keywords),
        )
    tokens = torch.zeros(num_rows, dtype=torch.int64)
    report(
        "logprobs of 16 rows, 5 top ones",
        reference=lambda: gather_logprobs_ref(logits, tokens, 5),
        ours=lambda: gather_logprobs(logits, tokens, 5),
    )


def bench_moe() -> None:
    num_experts, top_k = 8, 2
    gate_up = torch.randn(num_experts, 2 * INTERMEDIATE, HIDDEN).bfloat16()
    down = torch.randn(num_experts, HIDDEN, INTERMEDIATE).bfloat16()
    for num_tokens in (1, 16, 256):
        x = torch.randn(num_tokens, HIDDEN)
        routing = route_tokens(torch.randn(num_tokens, num_experts), top_k, renormalize=True)
        report(
            f"experts (2 of 8), one layer, {num_tokens} tokens",
            reference=lambda x=x, routing=routing: moe_mlp_ref(x, gate_up, down, *routing, "silu"),
            ours=lambda x=x, routing=routing: moe_mlp(x, gate_up, down, *routing, "silu"),
        )


BENCHMARKS = {
    "linear": bench_linear,
    "attention": bench_attention,
    "small_ops": bench_small_ops,
    "sampling": bench_sampling,
    "moe": bench_moe,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(BENCHMARKS)}; all without a name")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads")
    with torch.inference_mode():
        for name in arguments.names or BENCHMARKS:
            BENCHMARKS[name]()


if __name__ == "__main__":
    main()
