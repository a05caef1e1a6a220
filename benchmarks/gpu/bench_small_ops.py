"""The small kernels of a step on this GPU, against separate ops: `python benchmarks/gpu/bench_small_ops.py`.

One JSON row an op, model shape and number of rows: microseconds a call (median of replays of a CUDA graph of many calls), the
same of the baseline, its ratio, the op's bytes and the microseconds that they take at --bandwidth. Inputs of few rows stay in
the L2, where a decode step has just written them; those of a prefill step (`--rows 8192`, without the draws) do not fit. Row
`empty` is what a launch in a graph costs by itself; nothing here can take less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from pilotfish.kernels.drawn import Drawn
from pilotfish.kernels.expert_terms import ExpertTerms, sum_terms, sum_terms_and_norm
from pilotfish.kernels.gated_activation import gated_activation
from pilotfish.kernels.logprobs import gather_logprobs, gather_logprobs_ref
from pilotfish.kernels.qkv_prepare import prepare_qkv
from pilotfish.kernels.rms_norm import rms_norm
from pilotfish.kernels.rotary import apply_rotary_ref
from pilotfish.kernels.sampling import sample

# hidden, query heads, kv heads, intermediate
MODELS = {"qwen3-8b": (4096, 32, 8, 12288), "qwen3-0.6b": (1024, 16, 8, 3072)}
EXPERTS = (2048, 8)  # hidden, choices
MAX_DRAWN_ROWS = 1024
HEAD_DIM, PAGE_LEN, VOCAB, EPS = 128, 16, 151936, 1e-6
REPLAYS = 11
# temperature, top_k, top_p, min_p: the rows of a batch take them in turn
SAMPLING = {
    "greedy": [(0.0, 0, 1.0, 0.0)],
    "plain": [(1.0, 0, 1.0, 0.0)],
    "top_k": [(1.0, 50, 1.0, 0.0)],
    "top_p": [(1.0, 0, 0.95, 0.0)],
    "mixed": [(0.7, 20, 0.8, 0.0), (1.0, 0, 0.95, 0.0), (0.0, 0, 1.0, 0.0), (1.0, 50, 1.0, 0.05)],
    "flat_top_p": [(8.0, 0, 0.9, 0.0)],  # half the vocabulary is kept: the whole row is searched
}


@dataclass(frozen=True, kw_only=True)
class Case:
    op: str
    model: str
    rows: int
    num_bytes: int
    run: Callable[[], object]
    baseline: Callable[[], object] | None = None


def graph_microseconds(run: Callable[[], object], *, num_calls: int) -> float:
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(num_calls):
            run()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    replays_ms = [begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]
    return statistics.median(replays_ms) * 1e3 / num_calls


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def norm_case(model: str, rows: int) -> Case:
    hidden = MODELS[model][0]
    x, residual, weight = random(rows, hidden), random(rows, hidden), random(hidden)

    def baseline() -> torch.Tensor:
        return torch.nn.functional.rms_norm(x + residual, (hidden,), weight, EPS)

    num_bytes = (4 * rows + 1) * hidden * 2
    run = lambda: rms_norm(x, weight, EPS, residual_TH=residual)  # noqa: E731
    return Case(op="rms_norm", model=model, rows=rows, num_bytes=num_bytes, run=run, baseline=baseline)


def expert_sum_case(rows: int) -> Case:
    hidden, num_choices = EXPERTS
    experts = torch.arange(num_choices, dtype=torch.int32, device="cuda").repeat(rows, 1)
    terms = ExpertTerms(random(rows * num_choices, hidden), experts)
    residual, weight = random(rows, hidden), random(hidden)

    def baseline() -> tuple[torch.Tensor, torch.Tensor]:
        return rms_norm(sum_terms(terms), weight, EPS, residual_TH=residual)

    num_bytes = ((num_choices + 3) * rows + 1) * hidden * 2
    run = lambda: sum_terms_and_norm(terms, residual, weight, EPS)  # noqa: E731
    return Case(op="sum_terms_and_norm", model="qwen3-30b-a3b", rows=rows, num_bytes=num_bytes, run=run, baseline=baseline)


def qkv_case(model: str, rows: int) -> Case:
    _, num_heads, num_kv_heads, _ = MODELS[model]
    heads = (num_heads, num_kv_heads, num_kv_heads)
    q, k, v = random(rows, sum(heads), HEAD_DIM).split(heads, dim=1)
    k_cache, v_cache = random(2, rows + 1, PAGE_LEN, num_kv_heads, HEAD_DIM)
    q_norm, k_norm = random(2, HEAD_DIM)
    angles = torch.rand(4096, HEAD_DIM // 2, device="cuda") * 100
    cos, sin = angles.cos(), angles.sin()
    positions = torch.randint(0, 4096, (rows,), device="cuda")
    slots = torch.randperm((rows + 1) * PAGE_LEN, device="cuda")[:rows]

    def run() -> None:
        prepare_qkv(
            q, k, v, cos, sin, positions, k_cache, v_cache, slots, q_norm_D=q_norm, k_norm_D=k_norm, norm_eps=EPS
        )  # fmt: skip

    def baseline() -> None:
        normed_q, normed_k = rms_norm(q, q_norm, EPS), rms_norm(k, k_norm, EPS)
        apply_rotary_ref(normed_q, normed_k, cos, sin, positions)
        k_cache.flatten(0, 1)[slots] = normed_k
        v_cache.flatten(0, 1)[slots] = v

    num_bytes = rows * (2 * sum(heads) * HEAD_DIM * 2 + HEAD_DIM * 4)
    return Case(op="prepare_qkv", model=model, rows=rows, num_bytes=num_bytes, run=run, baseline=baseline)


def gated_case(model: str, rows: int) -> Case:
    intermediate = MODELS[model][3]
    gate_up = random(rows, 2 * intermediate)

    def baseline() -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    num_bytes = 3 * rows * intermediate * 2
    run = lambda: gated_activation(gate_up, "silu")  # noqa: E731
    return Case(op="gated_activation", model=model, rows=rows, num_bytes=num_bytes, run=run, baseline=baseline)


def sample_case(kind: str, rows: int) -> Case:
    logits = torch.randn(rows, VOCAB, device="cuda") * 4
    values = [SAMPLING[kind][row % len(SAMPLING[kind])] for row in range(rows)]
    columns = list(zip(*values, strict=True))
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32)
    temperature, top_k, top_p, min_p = (
        torch.tensor(column, dtype=dtype, device="cuda") for column, dtype in zip(columns, dtypes, strict=True)
    )
    seeds = torch.arange(rows, device="cuda")

    def run() -> Drawn:
        return sample(
            logits,
            temperature_M=temperature,
            top_k_M=top_k,
            top_p_M=top_p,
            min_p_M=min_p,
            seeds_M=seeds,
            slots_S=seeds,
            positions_S=seeds,
        )

    def sorted_draw() -> torch.Tensor:
        """The usual way in torch, without top_k and min_p."""
        scaled, order = (logits / temperature.clamp(min=1e-5).unsqueeze(1)).sort(dim=-1, descending=True)
        probs = scaled.softmax(-1)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p.unsqueeze(1), 0.0)
        race = probs / torch.empty_like(probs).exponential_()
        return order.gather(1, race.argmax(-1, keepdim=True))

    baseline = (lambda: logits.argmax(-1)) if kind == "greedy" else sorted_draw
    num_bytes = logits.numel() * logits.element_size()
    return Case(op=f"sample_{kind}", model="", rows=rows, num_bytes=num_bytes, run=run, baseline=baseline)


def logprobs_case(rows: int) -> Case:
    logits = torch.randn(rows, VOCAB, device="cuda") * 4
    tokens = torch.randint(0, VOCAB, (rows,), device="cuda")
    num_bytes = logits.numel() * logits.element_size()
    run, baseline = (lambda op=op: op(logits, tokens, 5) for op in (gather_logprobs, gather_logprobs_ref))
    return Case(op="gather_logprobs", model="", rows=rows, num_bytes=num_bytes, run=run, baseline=baseline)


def cases(all_rows: list[int]) -> Iterator[Case]:
    one = torch.zeros(1, device="cuda")
    yield Case(op="empty", model="", rows=1, num_bytes=8, run=lambda: one.add_(1))
    for rows in all_rows:
        for model in MODELS:
            yield norm_case(model, rows)
            yield qkv_case(model, rows)
            yield gated_case(model, rows)
        yield expert_sum_case(rows)
        if rows > MAX_DRAWN_ROWS:
            continue
        for kind in SAMPLING:
            yield sample_case(kind, rows)
        yield logprobs_case(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--ops", default="", help="only ops whose name starts so")
    parser.add_argument("--bandwidth", type=float, default=4.28, help="TB/s of this GPU")
    options = parser.parse_args()
    torch.manual_seed(0)
    for case in cases(options.rows):
        if not case.op.startswith(options.ops):
            continue
        num_calls = 32 if case.num_bytes < 2**21 else 8  # a baseline that sorts large batches takes milliseconds
        microseconds = graph_microseconds(case.run, num_calls=num_calls)
        row: dict[str, object] = {"op": case.op, "model": case.model, "rows": case.rows, "us": round(microseconds, 2)}
        row["limit_us"] = round(case.num_bytes / options.bandwidth / 1e6, 2)
        row |= {"mb": round(case.num_bytes / 1e6, 2), "tb_s": round(case.num_bytes / microseconds / 1e6, 2)}
        if case.baseline is not None:
            baseline = graph_microseconds(case.baseline, num_calls=num_calls)
            row |= {"baseline_us": round(baseline, 2), "speedup": round(baseline / microseconds, 2)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
