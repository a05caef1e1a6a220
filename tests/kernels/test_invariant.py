"""PILOTFISH_KERNELS=invariant: a row's bits are its own, whatever comes beside it and however its prompt is cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from attention_case import Case, make
from pilotfish.kernels import dispatch
from pilotfish.kernels.expert_terms import sum_terms
from pilotfish.kernels.gated_linear import gated_linear
from pilotfish.kernels.linear import TOLERANCE, choose_skinny_config, linear, linear_ref
from pilotfish.kernels.moe_config import MoeSizes, choose_config
from pilotfish.kernels.moe_mlp import run_experts
from pilotfish.kernels.moe_routing import route_tokens_ref
from pilotfish.kernels.paged_attention import _paged_attention_triton
from pilotfish.kernels.skinny_linear import skinny_linear

NUM_ROWS = 70
DTYPES = {"cpu": torch.float16, "cuda": torch.bfloat16}


@pytest.fixture(autouse=True)
def _invariant(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PILOTFISH_KERNELS", "invariant")
    _forget()
    yield
    monkeypatch.undo()
    _forget()


def _forget() -> None:
    dispatch.kernel_mode.cache_clear()
    dispatch._choose.cache_clear()


@pytest.mark.parametrize("activation", [None, "silu"])
def test_rows_of_linear_layers(device: str, activation: str | None) -> None:
    dtype = DTYPES[device]
    x, weight = torch.randn(NUM_ROWS, 200, device=device, dtype=dtype), torch.randn(70, 200, device=device, dtype=dtype) / 14
    config = choose_skinny_config("gated_linear" if activation else "linear", weight, NUM_ROWS)
    assert config is not None

    def run(rows: torch.Tensor) -> torch.Tensor:
        if device == "cuda":
            return gated_linear(rows, weight, activation=activation) if activation else linear(rows, weight)
        return skinny_linear(rows, weight, None, config, out_dtype=dtype, activation=activation)

    y = run(x)
    if activation is None:
        relative, absolute = TOLERANCE[dtype]
        torch.testing.assert_close(y, linear_ref(x, weight), rtol=relative, atol=absolute)
    for first, last in ((0, 1), (69, 70), (3, 20), (1, 69)):
        assert torch.equal(run(x[first:last].clone()), y[first:last])


def test_tokens_of_experts(device: str) -> None:
    dtype, num_experts, hidden, intermediate = DTYPES[device], 2, 40, 24
    x = torch.randn(NUM_ROWS, hidden, device=device, dtype=dtype)
    gate_up = torch.randn(num_experts, 2 * intermediate, hidden, device=device, dtype=dtype) * hidden**-0.5
    down = torch.randn(num_experts, hidden, intermediate, device=device, dtype=dtype) * intermediate**-0.5
    weights, experts = route_tokens_ref(torch.randn(NUM_ROWS, num_experts, device=device), 1, renormalize=True)

    def run(part: slice) -> torch.Tensor:
        sizes = MoeSizes(
            num_tokens=len(x[part]), num_choices=1, num_experts=num_experts, hidden=hidden, intermediate=intermediate
        )
        configs = {
            "gate_up": choose_config("moe_gate_up", sizes, x, gate_up),
            "down": choose_config("moe_down", sizes, x, down),
        }
        routing = weights[part].clone(), experts[part].clone()
        return sum_terms(run_experts(x[part].clone(), gate_up, down, *routing, "silu", **configs))

    out = run(slice(NUM_ROWS))
    for first, last in ((0, 1), (3, 70)):
        assert torch.equal(run(slice(first, last)), out[first:last])


@pytest.mark.parametrize("window", [None, 12])
def test_queries_of_attention(device: str, window: int | None) -> None:
    """Prompts that come whole, in chunks, or token by token, with others or alone."""
    case = Case(rows=((40, 40), (1, 33), (9, 25), (1, 1)), heads=(2, 1), window=window)
    (q, k, v, tables, starts, lens), options = make(case, device=device, dtype=DTYPES[device])

    def run(rows: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """Of (row, first query, last query)."""
        queries = [q[starts[row] + first : starts[row] + last] for row, first, last in rows]
        part_starts = torch.tensor([0] + [len(part) for part in queries], device=device).cumsum(0).int()
        part_lens = torch.stack([lens[row] - (starts[row + 1] - starts[row]) + last for row, _, last in rows]).int()
        part_tables = torch.stack([tables[row] for row, _, _ in rows])
        longest = max(len(part) for part in queries)
        out = _paged_attention_triton(
            torch.cat(queries), k, v, part_tables, part_starts, part_lens, **options | {"max_query_len": longest}
        )
        return list(out.split([len(part) for part in queries]))

    whole = run([(0, 0, 40), (1, 0, 1), (2, 0, 9), (3, 0, 1)])
    for rows in ([(0, 0, 17), (1, 0, 1)], [(0, 17, 40), (2, 1, 9)], [(2, 0, 1), (0, 39, 40), (3, 0, 1)], [(2, 0, 1)]):
        for (row, first, last), out in zip(rows, run(rows), strict=True):
            assert torch.equal(out, whole[row][first:last]), (row, first, last)


def test_a_config_for_every_number_of_tokens() -> None:
    x, weight = torch.zeros(1, 64, dtype=torch.bfloat16), torch.zeros(8, 32, 64, dtype=torch.bfloat16)
    sizes = MoeSizes(num_tokens=1, num_choices=2, num_experts=8, hidden=64, intermediate=16)
    for op in ("moe_gate_up", "moe_down"):
        assert len({choose_config(op, replace(sizes, num_tokens=number), x, weight) for number in (1, 9, 100, 5000)}) == 1
