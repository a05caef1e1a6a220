import pytest
import torch
from pilotfish.kernels.moe_sort import sort_pairs, sort_pairs_ref

# (tokens, choices, experts)
SMALL = {"one": (1, 1, 1), "few": (7, 2, 5), "decode": (16, 8, 20), "blocks": (8200, 2, 3)}
LARGE = {"qwen3": (128, 8, 128), "prefill": (8192, 8, 128), "odd": (3001, 3, 60)}


def check(experts, num_experts):
    pairs, starts = sort_pairs(experts, num_experts)
    expected_pairs, expected_starts = sort_pairs_ref(experts, num_experts)
    assert torch.equal(starts, expected_starts)
    assert torch.equal(pairs[: starts[-1]], expected_pairs)


def test_reference_lists_each_experts_pairs_in_their_order():
    experts = torch.tensor([[2, 0], [-1, 2], [0, 3]], dtype=torch.int32)
    pairs, starts = sort_pairs_ref(experts, 5)
    assert starts.tolist() == [0, 2, 2, 4, 5, 5]
    assert pairs.tolist() == [1, 4, 0, 3, 5]


def test_kernel_equals_reference(device, case):
    num_tokens, num_choices, num_experts = case
    check(torch.randint(num_experts, (num_tokens, num_choices), dtype=torch.int32, device=device), num_experts)


def test_other_ranks_pairs_are_left_out(device):
    experts = torch.randint(-3, 6, (90, 2), dtype=torch.int32, device=device)
    check(experts, 6)
    check(torch.full_like(experts, -1), 6)


@pytest.mark.parametrize("expert", [0, 3, 5])
def test_all_to_one_expert(device, expert):
    check(torch.full((70, 2), expert, dtype=torch.int32, device=device), 6)
