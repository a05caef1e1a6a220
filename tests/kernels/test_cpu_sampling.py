"""The C++ sampling, penalties and log-probabilities against their references."""

import pytest
import torch
from pilotfish.kernels import logprobs as logprobs_file
from pilotfish.kernels.cpu import ops as cpu_ops
from pilotfish.kernels.logprobs import gather_logprobs, gather_logprobs_ref
from pilotfish.kernels.penalties import apply_penalties, apply_penalties_ref
from pilotfish.kernels.philox import philox_uniform_ref
from pilotfish.kernels.sampling import sample, sample_ref

pytestmark = pytest.mark.usefixtures("two_threads")

INFINITY = float("inf")


def parameters(rows, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Arguments of sample for all rows; a value may be a list with one entry a row."""

    def column(value, dtype):
        return torch.tensor(value if isinstance(value, list) else [value] * rows, dtype=dtype)

    return {
        "temperature_M": column(temperature, torch.float32),
        "top_k_M": column(top_k, torch.int32),
        "top_p_M": column(top_p, torch.float32),
        "min_p_M": column(min_p, torch.float32),
        "seeds_M": torch.randint(-(2**63), 2**63 - 1, (rows,)),
        "slots_S": torch.arange(rows),
        "positions_S": torch.randint(0, 2**40, (rows,)),
    }


def assert_as_reference(logits, arguments):
    assert cpu_ops.supports("sample", logits.dtype)
    drawn = sample(logits, **arguments)
    tokens = drawn.tokens_S
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, sample_ref(logits, **arguments).tokens_S)
    assert torch.equal(drawn.logits_S, logits.gather(1, tokens[:, None])[:, 0])
    return tokens


@pytest.mark.parametrize("vocab", [1, 2, 15, 63, 64, 65, 1000, 4099])
def test_plain_draws(vocab):
    assert_as_reference(torch.randn(50, vocab) * 3, parameters(50))


@pytest.mark.parametrize("vocab", [1, 5, 64, 333, 5000])
def test_greedy_takes_the_lowest_of_equals(vocab):
    logits = torch.randint(-3, 3, (40, vocab)).float()
    assert torch.equal(assert_as_reference(logits, parameters(40, temperature=0.0)), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 5.0])
@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 2000},
        {"top_k": 10**6},
        {"top_p": 0.0},
        {"top_p": 0.05},
        {"top_p": 0.9},
        {"min_p": 0.02},
        {"min_p": 1.0},
        {"min_p": 7.0},
        {"top_k": 50, "top_p": 0.8, "min_p": 0.01},
    ],
    ids=str,
)
def test_filtered_draws(temperature, filters):
    logits = torch.randn(30, 3001) * torch.linspace(0.1, 8, 30).unsqueeze(1)
    assert_as_reference(logits, parameters(30, temperature=temperature, **filters))


def test_rows_with_different_parameters():
    logits = torch.randn(6, 500) * 4
    arguments = parameters(
        6,
        temperature=[0.0, 1.0, 0.5, 2.0, 0.0, 1.3],
        top_k=[3, 0, 5, -1, 0, 40],
        top_p=[0.5, 1.0, 0.9, 0.3, 1.0, 1.0],
        min_p=[0.1, 0.0, 0.0, 0.05, 0.0, 0.3],
    )
    tokens = assert_as_reference(logits, arguments)
    for row in range(6):
        of_row = {name: arguments[name][row : row + 1] for name in ("slots_S", "positions_S")}
        alone = sample(logits[row : row + 1], **(arguments | of_row))
        assert alone.tokens_S.item() == tokens[row]


@pytest.mark.parametrize(
    ("filters", "num_kept"),
    [({"top_k": 10}, 10), ({"top_p": 0.4751}, 10), ({"top_p": 0.4749}, 10), ({"top_k": 10, "top_p": 0.449}, 5)],
    ids=str,
)
def test_the_cut_falls_between_logits_that_hardly_differ(filters, num_kept):
    """Twenty tokens of nearly equal probability beside one far away: a coarse sort of the logits cannot tell them apart."""
    logits = torch.full((4000, 21), -1000.0)
    logits[:, :20] = torch.linspace(1e-3, 0, 20)
    drawn = sample(logits, **parameters(4000, **filters))
    assert set(drawn.tokens_S.tolist()) == set(range(num_kept))


# (seed, token) whose random word at position 0 is 0xffffff8c, which rounds to u = 1 without a limit, and 5: u = 1.3e-9.
SMALLEST_NOISE, LARGEST_NOISE = (4696, 376), (13259, 6387)


@pytest.mark.parametrize(("seed", "token"), [SMALLEST_NOISE, LARGEST_NOISE])
@pytest.mark.parametrize("advantage", [-1e-4, 1e-4])
def test_extreme_noise_is_exact(seed, token, advantage):
    arguments = {**parameters(1), "seeds_M": torch.tensor([seed]), "positions_S": torch.tensor([0])}
    uniform = philox_uniform_ref(arguments["seeds_M"], arguments["positions_S"], token + 1)[0].double()
    gumbel = -torch.log(-torch.log1p(-uniform))
    logits = torch.full((1, token + 1), -INFINITY)
    logits[0, token] = 0.0
    logits[0, 3] = gumbel[token] - gumbel[3] - advantage
    assert_as_reference(logits, arguments)
    assert sample(logits, **arguments).tokens_S.item() == (token if advantage > 0 else 3)


def test_equal_logits_are_kept_or_dropped_together():
    logits = torch.zeros(2000, 8)
    logits[:, 6:] = -9.0
    drawn = assert_as_reference(logits, parameters(2000, top_k=2))
    assert set(drawn.tolist()) == set(range(6))
    assert set(sample(logits, **parameters(2000, top_p=0.4)).tokens_S.tolist()) == set(range(6))


def test_tokens_at_minus_infinity_are_never_drawn():
    logits = torch.full((300, 1000), -INFINITY)
    logits[:, [5, 17, 999]] = torch.tensor([1.0, 0.5, 0.7])
    for filters in ({}, {"top_k": 500}, {"top_p": 0.999}, {"min_p": 0.001}):
        assert set(assert_as_reference(logits, parameters(300, **filters)).tolist()) == {5, 17, 999}


@pytest.mark.parametrize("broken", [float("nan"), INFINITY, -INFINITY])
@pytest.mark.parametrize("vocab", [3, 64, 1000])
def test_broken_rows_draw_some_token(broken, vocab):
    logits = torch.randn(6, vocab)
    logits[1], logits[3, ::2], logits[5, 1] = broken, broken, broken
    for temperature in (0.0, 1.0):
        for filters in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 2, "top_p": 0.5, "min_p": 0.5}):
            arguments = parameters(6, temperature=temperature, **filters)
            tokens, expected = sample(logits, **arguments).tokens_S, sample_ref(logits, **arguments).tokens_S
            assert bool(((tokens >= 0) & (tokens < vocab)).all())
            assert torch.equal(tokens[[0, 2, 4]], expected[[0, 2, 4]])


def test_draws_follow_the_softmax():
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5]).repeat(40_000, 1)
    counts = torch.bincount(sample(logits, **parameters(40_000, temperature=0.8)).tokens_S, minlength=5)
    torch.testing.assert_close(counts / 40_000, (logits[0] / 0.8).softmax(-1), rtol=0, atol=0.012)


def test_the_noise_is_that_of_philox():
    """Flat logits: the winner is the token with the largest Gumbel noise, the one with the smallest uniform number."""
    arguments = parameters(200)
    uniform = philox_uniform_ref(arguments["seeds_M"], arguments["positions_S"], 777)
    assert torch.equal(sample(torch.zeros(200, 777), **arguments).tokens_S, uniform.argmin(-1))


def test_views_of_logits():
    assert_as_reference(torch.randn(10, 600)[::2, 30:400], parameters(5))


@pytest.mark.parametrize("vocab", [1, 33, 2000])
def test_penalties(vocab):
    rows, table_rows = 7, 4
    logits = torch.randn(rows, vocab + 3)[:, :vocab] * 3
    expected = logits.clone()
    counts = torch.randint(-4, 5, (table_rows, vocab), dtype=torch.int32).clamp(min=0)
    arguments = {
        "prompt_mask_RV": torch.rand(table_rows, vocab) < 0.3,
        "output_counts_RV": counts,
        "table_rows_S": torch.tensor([2, -1, 0, 3, -1, 1, 2]),
        "repetition_S": torch.tensor([1.0, 2.0, 1.3, 0.8, 1.0, 1.1, 1.0]),
        "presence_S": torch.tensor([0.0, 1.0, 0.5, -0.5, 0.0, 2.0, 0.3]),
        "frequency_S": torch.tensor([0.0, 1.0, 0.1, -0.2, 0.0, 1.0, 0.0]),
    }
    assert cpu_ops.supports("apply_penalties", logits.dtype)
    apply_penalties(logits, **arguments)
    apply_penalties_ref(expected, **arguments)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("rows", "vocab"), [(0, 5), (1, 1), (4, 20), (9, 3003)])
@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_logprobs(rows, vocab, num_top):
    num_top = min(num_top, vocab)
    logits = torch.randn(rows, vocab) * 5
    tokens = torch.randint(0, vocab, (rows,))
    assert cpu_ops.supports("gather_logprobs", logits.dtype, tokens.dtype)
    logprob, top_ids, top_logprobs, rank = gather_logprobs(logits, tokens, num_top)
    expected = gather_logprobs_ref(logits, tokens, num_top)
    relative, absolute = logprobs_file.TOLERANCE
    torch.testing.assert_close(logprob, expected[0], rtol=relative, atol=absolute)
    assert torch.equal(top_ids, expected[1])
    torch.testing.assert_close(top_logprobs, expected[2], rtol=relative, atol=absolute)
    assert torch.equal(rank, expected[3])


def test_logprobs_of_a_large_vocabulary_are_exact():
    logits = torch.randn(3, 150_000)
    tokens = torch.tensor([0, 75_000, 149_999])
    logprob, *_ = gather_logprobs(logits, tokens, 0)
    exact = logits.double().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprob.double(), exact, rtol=1e-6, atol=1e-6)


def test_top_logprobs_of_equal_and_masked_logits():
    logits = torch.tensor([[1.0, 3.0, -INFINITY, 3.0, 2.0]])
    logprob, top_ids, top_logprobs, rank = gather_logprobs(logits, torch.tensor([4]), 5)
    assert top_ids.tolist() == [[1, 3, 4, 0, 2]]
    assert top_logprobs[0, 4] == -INFINITY
    assert rank.tolist() == [3]
    torch.testing.assert_close(logprob, logits.log_softmax(-1)[:, 4])
