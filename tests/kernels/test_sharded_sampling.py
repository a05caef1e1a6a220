import pytest
import torch
from pilotfish.kernels import sharded_sampling
from pilotfish.kernels.drawn import SequenceEnds
from pilotfish.kernels.sampling import sample, sample_ref
from pilotfish.kernels.sharded_sampling import (
    pick_winner,
    pick_winner_ref,
    pick_winner_triton,
    race_shard,
    race_shard_ref,
    race_shard_triton,
)

# (rows, vocabulary, tokens of each shard)
SMALL = {"two": (15, 77, 40), "three": (7, 3001, 1004), "last_of_one": (3, 9, 4), "empty": (0, 64, 32)}
LARGE = {"qwen": (128, 151936, 75968), "four": (8, 32000, 8000)}
NUM_SLOTS = 200


def tables(device, num_rows):
    slots = torch.randperm(NUM_SLOTS, device=device)[:num_rows]
    return {
        "temperature_M": torch.tensor([0.0, 1.0, 0.3, 5.0], device=device).repeat(NUM_SLOTS // 4),
        "seeds_M": torch.randint(-(2**63), 2**63 - 1, (NUM_SLOTS,), device=device),
        "slots_S": slots,
        "positions_S": torch.randint(0, 2**40, (num_rows,), device=device),
    }


def unfiltered(tensors):
    off = torch.ones(NUM_SLOTS, device=tensors["seeds_M"].device)
    named = {"top_k_M": torch.zeros_like(off, dtype=torch.int32), "top_p_M": off, "min_p_M": 0 * off}
    return {name: (tensors | named)[name] for name in ("temperature_M", *named, "seeds_M", "slots_S", "positions_S")}


def run_triton(logits, **tensors):
    names = ("temperature_M", "seeds_M", "slots_S", "positions_S")
    return race_shard_triton(logits, *(tensors[name] for name in names), first_token=tensors["first_token"])


def run_ref(logits, **tensors):
    names = ("temperature_M", "seeds_M", "slots_S", "positions_S")
    return race_shard_ref(logits, *(tensors[name] for name in names), first_token=tensors["first_token"])


def draw(race, pick, logits, size, tensors):
    starts = range(0, logits.shape[1], size)
    return pick(torch.stack([race(logits[:, start : start + size], **tensors, first_token=start) for start in starts]))


RUN = {"cpu": (run_triton, pick_winner_triton), "cuda": (race_shard, pick_winner)}


def test_shards_draw_what_one_draws(device, case):
    num_rows, vocab, size = case
    logits = torch.randn(num_rows, vocab, device=device) * 3
    tensors = tables(device, num_rows)
    alone = sample_ref(logits, **unfiltered(tensors))
    expected = alone.tokens_S
    for race, pick in (RUN[device], (run_ref, pick_winner_ref)):
        drawn = draw(race, pick, logits, size, tensors)
        tokens = drawn.tokens_S
        assert tokens.dtype == torch.int64
        # Scores that tie within float32 rounding may fall either way: at most one draw in a thousand.
        assert (tokens != expected).sum() <= num_rows // 1000
        assert torch.equal(drawn.logits_S[tokens == expected], alone.logits_S[tokens == expected])


@pytest.mark.parametrize(("vocab", "size"), [(5000, 2500), (333, 112), (64, 32), (9, 4)])
def test_the_cpp_race_draws_what_the_cpp_sample_draws(vocab, size):
    logits = torch.randn(60, vocab) * 3
    tensors = tables("cpu", 60)
    drawn = draw(race_shard, pick_winner, logits, size, tensors)
    assert torch.equal(drawn.bits, sample(logits, **unfiltered(tensors)).bits)


def test_of_equals_the_lowest_token_wins(device):
    logits = torch.zeros(3, 3000, device=device)
    logits[0, [7, 1500]] = 2.0
    logits[1, [1024, 2999]] = 2.0
    tensors = tables(device, 3) | {"temperature_M": torch.zeros(NUM_SLOTS, device=device)}
    for race, pick in (RUN[device], (run_ref, pick_winner_ref), (race_shard, pick_winner)):
        assert draw(race, pick, logits, 1000, tensors).tokens_S.tolist() == [7, 1024, 0]


def test_what_is_not_a_number_does_not_win(device):
    logits = torch.zeros(3, 64, device=device)
    logits[0, :32] = float("nan")
    logits[1, :32] = -float("inf")
    logits[2] = float("nan")
    tensors = tables(device, 3)
    for race, pick in (RUN[device], (run_ref, pick_winner_ref), (race_shard, pick_winner)):
        drawn = draw(race, pick, logits, 32, tensors)
        assert (drawn.tokens_S[:2] >= 32).all()
        assert 0 <= drawn.tokens_S[2] < 64
        assert drawn.logits_S.isfinite().tolist() == [True, True, False]


@pytest.mark.parametrize("num_rows", [3, 300])
def test_the_winner_is_appended_to_its_sequence(device, num_rows):
    slots = torch.randperm(500, device=device)[:num_rows]
    for pick in (RUN[device][1], pick_winner):
        table = torch.full((500, 9), -1, dtype=torch.int32, device=device)
        ends = SequenceEnds(table, slots, torch.randint(9, (num_rows,), device=device))
        drawn = pick(torch.randint(1, 99, (2, 3, num_rows), dtype=torch.int32, device=device).view(torch.float32), ends)
        assert torch.equal(table[ends.slots_S, ends.lengths_S], drawn.tokens_S.int())
        assert (table >= 0).sum() == num_rows


def test_misfits_are_refused():
    tensors = tables("cpu", 2)
    with pytest.raises(ValueError, match="multiple of 4"):
        race_shard(torch.zeros(2, 8), **tensors, first_token=6)
    with pytest.raises(ValueError, match="float32"):
        race_shard(torch.zeros(2, 8).half(), **tensors, first_token=0)
    with pytest.raises(ValueError, match="slots"):
        race_shard(torch.zeros(3, 8), **tensors, first_token=0)
    with pytest.raises(ValueError, match="pick_winner"):
        sharded_sampling.pick_winner(torch.zeros(2, 4, 1))
