import pytest
import torch
from pilotfish.kernels.drawn import SequenceEnds
from pilotfish.kernels.philox import philox_uniform_ref
from pilotfish.kernels.sampling import draw_triton, sample, sample_ref
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

# (rows, vocabulary)
SMALL = {"one": (1, 20), "odd": (15, 77), "empty": (0, 64), "three_chunks": (3, 9001)}
LARGE = {"batch": (64, 151936), "one_row": (1, 32000), "many_rows": (3000, 1000)}
NUM_SPARE_SLOTS = 3


def sample_triton(logits, *, slots_S, positions_S, ends=None, **tables):
    return draw_triton(logits, tuple(tables.values()), slots_S, positions_S, ends)[0]


RUN = {"cpu": sample_triton, "cuda": sample}


def options(num_rows, device="cpu", **values):
    """Tables of random slots that hold the rows' parameters; a value is one for all rows or a list."""
    kinds = {
        "temperature": (torch.float32, 1.0),
        "top_k": (torch.int32, 0),
        "top_p": (torch.float32, 1.0),
        "min_p": (torch.float32, 0.0),
        "seeds": (torch.int64, list(range(num_rows))),
    }
    num_slots = num_rows + NUM_SPARE_SLOTS
    slots = torch.randperm(num_slots)[:num_rows]
    tensors = {}
    for name, (dtype, default) in kinds.items():
        tensors[f"{name}_M"] = torch.randint(1, 5, (num_slots,)).to(dtype)
        tensors[f"{name}_M"][slots] = torch.tensor(values.get(name, default), dtype=dtype)
    positions = torch.tensor(values.get("positions", 11)).expand(num_rows).contiguous()
    return {name: tensor.to(device) for name, tensor in (tensors | {"slots_S": slots, "positions_S": positions}).items()}


def rows_of(tensors, rows):
    return tensors | {name: tensors[name][rows] for name in ("slots_S", "positions_S")}


def mixed_options(num_rows, device):
    return options(
        num_rows,
        device,
        temperature=[(0.0, 1.0, 0.2, 5.0, 1.0)[row % 5] for row in range(num_rows)],
        top_k=[(0, 0, 10, -1, 3)[row % 5] for row in range(num_rows)],
        top_p=[(0.1, 1.0, 0.9, 0.8, 1.0)[row % 5] for row in range(num_rows)],
        min_p=[(0.9, 0.0, 0.0, 0.01, 0.0)[row % 5] for row in range(num_rows)],
    )


def test_kernel_equals_reference(device, case):
    num_rows, vocab = case
    logits = torch.randn(num_rows, vocab + 5, device=device)[:, 5:]
    tensors = mixed_options(num_rows, device)
    drawn, expected = RUN[device](logits, **tensors), sample_ref(logits, **tensors).tokens_S
    tokens = drawn.tokens_S
    assert tokens.dtype == torch.int64
    assert torch.equal(drawn.logits_S, logits.gather(1, tokens[:, None])[:, 0])
    # Scores that tie within float32 rounding may fall either way: at most one draw in a thousand.
    assert (tokens != expected).sum() <= num_rows // 1000


def test_greedy_takes_the_lowest_of_the_largest(device):
    logits = torch.zeros(3, 5000, device=device)
    logits[0, [7, 4500]] = 2.0
    logits[1, [4097, 4999]] = 2.0
    for run in (RUN[device], sample_ref):
        assert run(logits, **options(3, device, temperature=0.0)).tokens_S.tolist() == [7, 4097, 0]


def test_forbidden_tokens_are_never_drawn(device):
    logits = torch.full((12, 40), -float("inf"), device=device)
    logits[:, [3, 17]] = torch.tensor([0.0, 0.0], device=device)
    drawn = RUN[device](logits, **options(12, device, temperature=[0.0, 5.0, 5.0] * 4, top_k=[0, 0, 20] * 4))
    assert set(drawn.tokens_S.tolist()) == {3, 17}


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, under the interpreter, on -inf minus -inf
def test_a_broken_row_draws_a_token_and_spoils_no_other(device):
    logits = torch.randn(6, 40, device=device)
    tensors = mixed_options(6, device)
    broken = logits.clone()
    broken[1], broken[2], broken[4, ::2] = float("nan"), -float("inf"), float("nan")
    for run in (RUN[device], sample_ref, sample):
        drawn = run(broken, **tensors)
        tokens = drawn.tokens_S
        assert torch.equal(tokens[[0, 3, 5]], run(logits, **tensors).tokens_S[[0, 3, 5]])
        assert not drawn.logits_S[[1, 2]].isfinite().any()
        assert tokens.min() >= 0
        assert tokens.max() < 40


def test_a_row_draws_the_same_in_every_batch(device):
    logits = torch.randn(4, 300, device=device)
    tensors = mixed_options(4, device)
    together = RUN[device](logits, **tensors).tokens_S
    backwards = RUN[device](logits.flip(0), **rows_of(tensors, [3, 2, 1, 0])).tokens_S
    assert torch.equal(backwards.flip(0), together)
    for row in range(4):
        assert RUN[device](logits[row : row + 1], **rows_of(tensors, [row])).tokens_S == together[row]


def test_a_shard_of_the_vocabulary_keeps_its_noise(device):
    """Tokens after the first 100 switched off: the winner among those left is the one of the race over 100 alone."""
    logits = torch.randn(8, 400, device=device)
    masked = logits.clone()
    masked[:, 100:] = -float("inf")
    tensors = options(8, device)
    assert torch.equal(RUN[device](masked, **tensors).tokens_S, RUN[device](logits[:, :100], **tensors).tokens_S)


@pytest.mark.parametrize("over", ["seeds", "positions"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.5, 0, 1.0, 0.0), (2.0, 12, 1.0, 0.0), (1.0, 0, 0.8, 0.0), (1.2, 0, 1.0, 0.1), (1.5, 15, 0.9, 0.05)],
)
def test_draws_follow_the_filtered_distribution(device, over, temperature, top_k, top_p, min_p):
    """Chi-square of 20,000 draws against the probabilities that transformers' warpers leave (on "cpu" the public op's)."""
    num_draws = 20_000
    logits = torch.randn(1, 30)
    scores = logits / temperature
    for warper in (TopKLogitsWarper(top_k) if top_k else None, TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)):
        scores = warper(None, scores) if warper else scores
    expected = scores.double().softmax(-1)[0] * num_draws
    counted = {"seeds": [1234] * num_draws, "positions": [77] * num_draws, over: list(range(num_draws))}
    tensors = options(num_draws, device, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, **counted)
    tokens = sample(logits.to(device).expand(num_draws, -1), **tensors).tokens_S.cpu()
    counts = tokens.bincount(minlength=30).double()
    kept = expected > 0
    assert not counts[~kept].any()
    freedom = int(kept.sum()) - 1
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    # Wilson and Hilferty: the cube root of chi-square over its freedom is normal. Four sigma: one in 30,000.
    deviation = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5
    assert deviation < 4


def test_of_equal_logits_the_smallest_uniform_wins(device):
    tensors = options(20, device)
    tokens = RUN[device](torch.zeros(20, 900, device=device), **tensors).tokens_S
    uniform = philox_uniform_ref(tensors["seeds_M"][tensors["slots_S"]], tensors["positions_S"], 900)
    assert torch.equal(tokens, uniform.argmin(-1))


def ends_of(tensors, num_tokens=9):
    slots = tensors["slots_S"]
    table = torch.full((len(slots) + NUM_SPARE_SLOTS, num_tokens), -1, dtype=torch.int32, device=slots.device)
    return SequenceEnds(table, slots, torch.randint(num_tokens, slots.shape, device=slots.device))


def test_tokens_are_appended_to_their_sequences(device):
    tensors = mixed_options(7, device)
    for run in (RUN[device], sample, sample_ref):
        ends = ends_of(tensors)
        drawn = run(torch.randn(7, 50, device=device), **tensors, ends=ends)
        assert torch.equal(ends.token_ids_MC[ends.slots_S, ends.lengths_S], drawn.tokens_S.int())
        assert (ends.token_ids_MC >= 0).sum() == 7


def test_ends_that_misfit_are_refused(device):
    table, slots = torch.zeros((6, 9), dtype=torch.int32, device=device), torch.arange(3, device=device)
    for arguments in (
        (table.long(), slots, slots),
        (table.T, slots, slots),
        (table, slots.int(), slots),
        (table, slots, slots[1:]),
    ):
        with pytest.raises(ValueError, match="must be contiguous"):
            SequenceEnds(*arguments)
    with pytest.raises(ValueError, match="3 slots of sequences for 4"):
        sample_triton(torch.zeros(4, 5, device=device), **options(4, device), ends=SequenceEnds(table, slots, slots))


@pytest.mark.gpu
def test_a_captured_draw_follows_its_inputs():
    logits = torch.randn(10, 151936, device="cuda") * 4
    tensors = mixed_options(10, "cuda")
    sample(logits, **tensors)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sample(logits, **tensors)
    for _ in range(2):
        logits.copy_(torch.randn_like(logits) * 4)
        for value in tensors.values():
            value.copy_(value.roll(1))
        graph.replay()
        assert torch.equal(captured.bits, sample(logits, **tensors).bits)


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("top_k_M", torch.ones(5, dtype=torch.int32)),
        ("top_k_M", torch.ones(6)),
        ("top_p_M", torch.ones(6, dtype=torch.float64)),
        ("min_p_M", torch.ones(12)[::2]),
        ("seeds_M", torch.ones(6, dtype=torch.int32)),
        ("slots_S", torch.ones(2, dtype=torch.int64)),
        ("positions_S", torch.ones(6, dtype=torch.int64)[::2]),
    ],
)
def test_misfits_are_refused(change, value):
    with pytest.raises(ValueError, match=change[:-2]):
        sample(torch.zeros(3, 5), **(options(3) | {change: value}))
    for logits in (torch.zeros(3, 5).half(), torch.zeros(3, 0), torch.zeros(5, 3).T):
        with pytest.raises(ValueError, match="logits"):
            sample(logits, **options(3))
