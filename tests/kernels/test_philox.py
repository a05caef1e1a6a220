import pytest
import torch
from pilotfish.kernels.philox import _philox_uniform_triton, philox_uniform, philox_uniform_ref, philox_words_ref

SMALL = {"one": (1, 1), "odd": (3, 37), "empty": (0, 5), "no_draws": (2, 0), "two_blocks": (2, 1030)}
LARGE = {"vocabulary": (16, 151936)}
RUN = {"cpu": _philox_uniform_triton, "cuda": philox_uniform}

# counter, key, words: the known answers that the authors of Random123 publish for philox4x32-10.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    assert philox_words_ref(counter=words(counter), key=words(key)) == words(expected)


def test_the_draw_counts_with_the_position_and_the_seed_is_the_key():
    """Draw 4 of position 2^32 + 5 is the first word of counter (1, 5, 1, 0); a negative seed is its bit pattern."""
    seed, position = torch.tensor([-2]), torch.tensor([2**32 + 5])
    (word, *_) = philox_words_ref(counter=words("1 5 1 0"), key=words("fffffffe ffffffff"))
    uniform = philox_uniform_ref(seed, position, 5)[0, 4]
    assert uniform == torch.tensor((int(word) + 0.5) / 2**32, dtype=torch.float32)


def test_kernel_equals_reference_bit_by_bit(device, case):
    num_rows, num_draws = case
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows,), device=device)
    positions = torch.randint(0, 2**40, (num_rows,), device=device)
    uniform = RUN[device](seeds, positions, num_draws)
    assert torch.equal(uniform, philox_uniform_ref(seeds, positions, num_draws))
    assert torch.equal(uniform.cpu(), philox_uniform_ref(seeds.cpu(), positions.cpu(), num_draws))


def test_uniform_strictly_between_zero_and_one():
    uniform = philox_uniform_ref(torch.arange(50), torch.arange(50), 8000)
    assert uniform.min() > 0
    assert uniform.max() < 1
    assert abs(uniform.double().mean() - 0.5) < 2e-3
    assert abs(uniform.double().var() - 1 / 12) < 1e-3
    histogram = torch.histc(uniform, 100, 0, 1)
    assert ((histogram / 4000 - 1).abs() < 0.08).all()


def test_a_row_does_not_depend_on_the_others_or_on_the_number_of_draws(device):
    seeds, positions = torch.tensor([7, 8, 7], device=device), torch.tensor([1, 1, 2], device=device)
    together = RUN[device](seeds, positions, 50)
    assert torch.equal(RUN[device](seeds[1:2], positions[1:2], 21), together[1:2, :21])
    assert not (together[0] == together[1]).any()
    assert not (together[0] == together[2]).any()


def test_misfits_are_refused():
    seeds = torch.zeros(2, dtype=torch.int64)
    for arguments in ((seeds, seeds[:1], 3), (seeds.int(), seeds, 3), (seeds, seeds, -1)):
        with pytest.raises(ValueError, match="philox_uniform"):
            philox_uniform(*arguments)
