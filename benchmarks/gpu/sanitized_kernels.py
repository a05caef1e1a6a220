"""What sanitize.sh watches: each CUDA C++ kernel named, on small ragged shapes, against its reference.

    python benchmarks/gpu/sanitized_kernels.py streaming_linear tall_linear streaming_experts tall_experts norm_and_route \
        decode_attention prefill_attention between_attentions

Every way through a kernel once: sums split and not, beside the stages and in their place, gated and not, rows in order and not.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from itertools import product

import torch
from pilotfish.kernels.attention_config import SPECIALIZED_PREFILL_CONFIGS, FusedDecodeConfig
from pilotfish.kernels.between_attentions import fused_layer, new_counter, separate_layer
from pilotfish.kernels.expert_terms import sum_terms
from pilotfish.kernels.fused_decode import fused_decode
from pilotfish.kernels.gated_linear import gated_linear_ref
from pilotfish.kernels.head_race import race_head_by, race_head_ref
from pilotfish.kernels.linear import linear_ref
from pilotfish.kernels.moe_mlp import moe_mlp_ref, run_experts
from pilotfish.kernels.norm_and_route import fused_norm_and_route, separate_norm_and_route
from pilotfish.kernels.paged_attention import paged_attention_ref
from pilotfish.kernels.qkv_prepare import prepare_qkv_ref
from pilotfish.kernels.race import RaceRows
from pilotfish.kernels.skinny_linear import skinny_linear
from pilotfish.kernels.specialized_prefill import specialized_prefill
from pilotfish.kernels.streaming_experts import StreamingConfig
from pilotfish.kernels.tall_experts import TallConfig
from pilotfish.kernels.tall_linear import TALL_CONFIGS
from pilotfish.kernels.tune_layer import make_layer

ALLOWED_ERROR = 1e-2  # of norms
Pair = tuple[str, torch.Tensor, torch.Tensor]  # what it is, the result, the reference's


def streaming_linear() -> Iterator[Pair]:
    """Inputs and outputs that fill neither steps nor tiles."""
    weight, bias = random(330, 1000, scale=0.03), random(330, scale=1.0)
    for num_rows, (tile_n, split_k, num_stages, x_stages) in product(
        (5, 128), ((64, 1, 3, None), (64, 4, 3, None), (64, 2, 6, 2), (128, 2, 3, 3))
    ):
        x = random(num_rows, 1000, scale=1.0)
        config = {"kernel": "streaming", "tile_n": tile_n, "split_k": split_k, "num_stages": num_stages, "early_start": True}
        config |= {} if x_stages is None else {"x_stages": x_stages}
        name = f"{num_rows} rows, {config}"
        yield name, skinny_linear(x, weight, bias, config, out_dtype=torch.bfloat16), linear_ref(x, weight, bias)
        y = skinny_linear(x, weight, bias, config, out_dtype=torch.bfloat16, activation="silu")
        yield f"gated, {name}", y, gated_linear_ref(x, weight, bias, activation="silu")
    yield from racing_heads()


def racing_heads() -> Iterator[Pair]:
    """Greedy and sampled rows, and some whose logits are stored."""
    weight = random(331, 1000, scale=0.1)
    for num_rows, tile_n, x_stages in ((5, 64, None), (128, 64, None), (128, 128, 2), (31, 256, None)):
        x, slots = random(num_rows, 1000, scale=1.0), torch.arange(num_rows, device="cuda")
        rows = RaceRows((slots % 2).float(), slots, slots, slots, (slots % 3 == 1).long())
        config = {"kernel": "streaming", "tile_n": tile_n, "split_k": 1, "num_stages": 3, "early_start": True}
        config |= {} if x_stages is None else {"x_stages": x_stages}
        scores, expected = race_head_by(x, weight, rows, config), race_head_ref(x, weight, rows, tile=tile_n)
        wanted = slots % 3 == 1
        yield f"logits of {num_rows} rows, {config}", scores.logits_SV[wanted], expected.logits_SV[wanted]
        assert scores.bests is not None
        assert expected.bests is not None
        yield f"bests of {num_rows} rows, {config}", scores.bests.scores_ST[~wanted], expected.bests.scores_ST[~wanted]


def tall_linear() -> Iterator[Pair]:
    """Rows and outputs that fill no item."""
    weight, bias, x = random(976, 320, scale=0.05), random(976, scale=1.0), random(300, 320, scale=1.0)
    for config in TALL_CONFIGS:
        yield f"{config}", skinny_linear(x, weight, bias, config, out_dtype=torch.bfloat16), linear_ref(x, weight, bias)
        y = skinny_linear(x, weight, bias, config, out_dtype=torch.bfloat16, activation="silu")
        yield f"gated, {config}", y, gated_linear_ref(x, weight, bias, activation="silu")


def streaming_experts() -> Iterator[Pair]:
    for num_tokens, programs in ((3, 3), (40, 132)):
        yield expert_layer(num_tokens, StreamingConfig(tile=64, rows=16, num_stages=3, programs=programs))


def tall_experts() -> Iterator[Pair]:
    """Both products of a layer, rows that are gathered and rows in order."""
    for most_pairs in (96, 192):
        yield expert_layer(200, TallConfig(most_pairs=most_pairs, num_stages=3))


def norm_and_route() -> Iterator[Pair]:
    """The choice follows from the logits of the kernel's own norm; what differs between two sums shows in weights alone."""
    x, residual, gain = random(5, 2048, scale=1.0), random(5, 2048, scale=1.0), random(2048, scale=1.0)
    for num_experts in (64, 128):
        arguments = (x, residual, gain, 1e-6, random(num_experts, 2048, scale=0.02), 8)
        results = fused_norm_and_route(*arguments, renormalize=False), separate_norm_and_route(*arguments, renormalize=False)
        for name, fused, separate in zip(("norm", "sum", "weights"), *results, strict=False):
            yield f"{name} before {num_experts} experts", fused, separate


def decode_attention() -> Iterator[Pair]:
    """Rows of one key, of some tiles and of a tile begun, with norms and a window; clusters of one and of several CTAs."""
    lengths, (num_heads, num_kv_heads, head_dim, page_len) = (1, 40, 300), (8, 2, 128, 16)
    pages = -(-max(lengths) // page_len)
    tables = torch.arange(len(lengths) * pages, dtype=torch.int32, device="cuda").view(len(lengths), pages)
    positions = torch.tensor(lengths, device="cuda") - 1
    slots = tables.long().gather(1, positions[:, None] // page_len)[:, 0] * page_len + positions % page_len
    angles = torch.rand(max(lengths), head_dim // 2, device="cuda")
    qkv = random(len(lengths), num_heads + 2 * num_kv_heads, head_dim, scale=1.0)
    k_cache, v_cache = random(2, tables.numel(), page_len, num_kv_heads, head_dim, scale=1.0)
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    norms = {"q_norm_D": random(head_dim, scale=1.0), "k_norm_D": random(head_dim, scale=1.0), "norm_eps": 1e-6}
    starts, lens = torch.arange(len(lengths) + 1, device="cuda").int(), positions.int() + 1
    for window, num_splits, num_warps in ((None, 1, 4), (None, 4, 8), (50, 2, 8)):
        config = FusedDecodeConfig(num_splits=num_splits, num_warps=num_warps, num_stages=2)
        options = {"scale": head_dim**-0.5, "window": window, "sinks_N": None}
        out = fused_decode(
            q, k, v, angles.cos(), angles.sin(), k_cache, v_cache, slots, tables, lens, config=config, **norms, **options
        )
        turned_q, turned_k = q.clone(), k.clone()
        prepare_qkv_ref(turned_q, turned_k, v, angles.cos(), angles.sin(), positions, k_cache, v_cache, slots, **norms)
        expected = paged_attention_ref(turned_q, k_cache, v_cache, tables, starts, lens, max_query_len=1, **options)
        yield f"window {window}, {config}", out, expected


def prefill_attention() -> Iterator[Pair]:
    """Rows of one query, of tiles begun, with keys before them; tiles of one step and of several."""
    rows, (num_heads, num_kv_heads, head_dim, page_len) = ((1, 40), (70, 300), (33, 33)), (8, 2, 128, 16)
    starts = torch.tensor([0, *itertools.accumulate(query_len for query_len, _ in rows)], device="cuda").int()
    lens = torch.tensor([context_len for _, context_len in rows], device="cuda").int()
    pages = -(-int(lens.max()) // page_len)
    tables = torch.arange(len(rows) * pages, dtype=torch.int32, device="cuda").view(len(rows), pages)
    q = random(int(starts[-1]), num_heads, head_dim, scale=1.0)
    k_cache, v_cache = random(2, tables.numel(), page_len, num_kv_heads, head_dim, scale=1.0)
    arguments = (q, k_cache, v_cache, tables, starts, lens)
    expected = paged_attention_ref(*arguments, max_query_len=70, scale=head_dim**-0.5)
    for config in SPECIALIZED_PREFILL_CONFIGS:
        out = torch.empty_like(q)
        specialized_prefill(out, *arguments, config=config, skip_one_query=False, scale=head_dim**-0.5)
        yield f"{config}", out, expected


def between_attentions() -> Iterator[Pair]:
    """Dense and sparse layers, the last one too, the dense one of more weights than a ring holds."""
    for sizes, num_rows in product(((1024, 2048, 3072, 1, 1, 4096), (256, 512, 256, 32, 2, 768)), (1, 8)):
        layer, following = make_layer(sizes, torch.Generator("cuda").manual_seed(0))
        attended, residual = random(num_rows, sizes[1], scale=1.0), random(num_rows, sizes[0], scale=1.0)
        config = {"max_in_flight": 3, "prefetches": 1000}
        for after in (following, None):
            results = fused_layer(attended, residual, layer, after, counter=new_counter(attended.device), config=config)
            expected = separate_layer(attended, residual, layer, after)
            for name, result, reference in zip(("result", "residual"), results, expected, strict=True):
                yield f"{name} of {num_rows} rows of {sizes}, last {after is None}", result, sum_terms(reference)


def expert_layer(num_tokens: int, config: StreamingConfig | TallConfig) -> Pair:
    """Six experts, of which one token's choice belongs to another rank."""
    x, gate_up, down = random(num_tokens, 256, scale=1.0), random(6, 384, 256, scale=0.06), random(6, 256, 192, scale=0.07)
    weights, experts = torch.rand(num_tokens, 6, device="cuda").topk(2)
    experts = experts.int()
    experts[0, 1] = -1
    arguments = (x, gate_up, down, weights, experts, "silu")
    out = sum_terms(run_experts(*arguments, gate_up=config, down=config))
    return f"{num_tokens} tokens, {config}", out, moe_mlp_ref(*arguments)


def random(*shape: int, scale: float) -> torch.Tensor:
    return torch.randn(shape, device="cuda").mul_(scale).bfloat16()


KERNELS: dict[str, Callable[[], Iterator[Pair]]] = {
    "streaming_linear": streaming_linear,
    "tall_linear": tall_linear,
    "streaming_experts": streaming_experts,
    "tall_experts": tall_experts,
    "norm_and_route": norm_and_route,
    "decode_attention": decode_attention,
    "prefill_attention": prefill_attention,
    "between_attentions": between_attentions,
}


def main(names: list[str]) -> int:
    torch.manual_seed(0)
    num_wrong = 0
    for name in names:
        for what, y, expected in KERNELS[name]():
            error = ((y.float() - expected.float()).norm() / expected.float().norm()).item()
            if not error < ALLOWED_ERROR:
                print(f"{name}: {what} is off by {error:.1e}, relative", file=sys.stderr)
                num_wrong += 1
    torch.cuda.synchronize()
    print(f"{', '.join(names)}: {num_wrong} wrong")
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
