"""What fails in a step ends the rows that are to blame, and no others."""

from __future__ import annotations

import math

import pytest
import torch
from pilotfish.common.errors import ConfigError
from pilotfish.common.requests import FinishReason
from pilotfish.kernels import dispatch
from pilotfish.kernels.race import HeadScores

POISON = 255


class Wrapped:
    """A model with a hook before its forward pass and one behind its head."""

    def __init__(self, model, *, before=lambda batch: None, after=lambda logits_RV: logits_RV) -> None:
        self._model, self._before, self._after = model, before, after

    def __getattr__(self, name):
        return getattr(self._model, name)

    def forward(self, batch):
        self._before(batch)
        return self._model.forward(batch)

    def race_own(self, hidden_RH, rows):
        return HeadScores(self._after(self._model.race_own(hidden_RH, rows).logits_SV))


@pytest.fixture(params=[1, 2], ids=["plain", "overlapped"])
def in_flight(request) -> int:
    return request.param


@pytest.fixture
def crowd(make_request):
    return [make_request(f"r{i}", [i, i + 1, i + 2], max_tokens=6) for i in range(7)]


def test_an_unknown_kind_of_kernels_is_refused_at_the_start(make_loop, collector, monkeypatch, in_flight):
    with monkeypatch.context() as patch:
        patch.setenv("PILOTFISH_KERNELS", "fast")
        dispatch.kernel_mode.cache_clear()
        with pytest.raises(ConfigError, match="use one of auto, invariant, ref"):
            make_loop(collector, max_in_flight=in_flight)
    dispatch.kernel_mode.cache_clear()


def test_a_request_whose_rows_raise_ends_alone(run_requests, make_request, crowd, in_flight):
    def raise_on_poison(batch):
        if POISON in batch.token_ids_T:
            raise ValueError("poisoned")

    expected = run_requests(*crowd).tokens
    bad = make_request("bad", [1, POISON], max_tokens=6)
    result = run_requests(
        *crowd[:3], bad, *crowd[3:], wrap=lambda model: Wrapped(model, before=raise_on_poison), max_in_flight=in_flight
    )
    assert result.reason("bad") is FinishReason.ERROR
    assert result.ended["bad"].error == "ValueError: poisoned"
    assert result.tokens.pop("bad") == []
    assert result.tokens == expected


def test_a_step_too_large_for_the_memory_runs_in_parts(run_requests, crowd, in_flight):
    sizes = []

    def memory_for_8_tokens(batch):
        sizes.append(len(batch.token_ids_T))
        if sizes[-1] > 8:
            raise torch.OutOfMemoryError("no memory for so many tokens")

    expected = run_requests(*crowd).tokens
    result = run_requests(*crowd, wrap=lambda model: Wrapped(model, before=memory_for_8_tokens), max_in_flight=in_flight)
    assert max(sizes) > 8
    assert result.tokens == expected


def test_a_row_whose_logits_are_not_numbers_ends_alone(run_requests, make_request, crowd, in_flight):
    rows = []

    def find_row(batch):
        rows[:] = (batch.token_ids_T[batch.logits_rows_R] == POISON).nonzero().flatten().tolist()

    def spoil_row(logits_RV):
        logits_RV[rows] = math.nan
        return logits_RV

    expected = run_requests(*crowd).tokens
    assert not any(POISON in tokens for tokens in expected.values())
    result = run_requests(
        *crowd,
        make_request("bad", [1, POISON]),
        wrap=lambda model: Wrapped(model, before=find_row, after=spoil_row),
        max_in_flight=in_flight,
    )
    assert result.reason("bad") is FinishReason.ERROR
    assert "not finite" in result.ended["bad"].error
    assert result.tokens.pop("bad") == []
    assert result.tokens == expected


def test_bans_that_leave_no_token_end_the_request(run_requests, make_request, crowd):
    everything = tuple((token_id,) for token_id in range(320))
    result = run_requests(*crowd, make_request("mute", [1, 2], bad_words_ids=everything))
    assert result.reason("mute") is FinishReason.ERROR
    assert "bad_words" in result.ended["mute"].error
    assert result.reason("r0") is FinishReason.LENGTH


@pytest.mark.parametrize("bad_first", [True, False])
def test_a_request_that_cannot_be_admitted_ends_alone(make_loop, collector, make_request, in_flight, bad_first):
    """The engine refuses such requests; if one came through, it must not write into blocks of others."""
    loop = make_loop(collector, max_in_flight=in_flight, prefix_caching=False, num_kv_blocks=8, max_num_seqs=2)

    def run(*requests):
        for request in requests:
            loop.scheduler.add(request)
        while loop.has_work:
            loop.advance()

    run(make_request("expected", list(range(40)), max_tokens=6))
    # Both slots have had a sequence, whose blocks are then someone else's.
    run(make_request("before", [1] * 10, max_tokens=2), make_request("beside", [2] * 100, max_tokens=2))
    good = make_request("good", list(range(40)), max_tokens=6)
    unembeddable, unseedable = make_request("bad", [2**40] * 80), make_request("bad too", [1], seed=2**70)
    run(unembeddable, good) if bad_first else run(good, unembeddable)
    run(unseedable)
    assert [collector.reason(name) for name in ("bad", "bad too")] == [FinishReason.ERROR] * 2
    assert collector.tokens["good"] == collector.tokens["expected"]


def test_a_lost_device_is_not_blamed_on_a_request(make_loop, collector, crowd):
    def lose_device(batch):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    loop = make_loop(collector, wrap=lambda model: Wrapped(model, before=lose_device))
    for request in crowd:
        loop.scheduler.add(request)
    with pytest.raises(torch.AcceleratorError):
        loop.advance()
    assert not collector.ended
