from collections import Counter

import pytest
import torch
from pilotfish.kernels.expert_replicas import _choose_replicas_triton, choose_replicas, choose_replicas_ref

# (tokens, choices, experts, most copies)
SMALL = {"few": (7, 2, 8, 3), "one": (1, 1, 1, 1), "empty": (0, 2, 4, 2), "blocks": (300, 8, 16, 4)}
LARGE = {"qwen3": (4096, 8, 128, 16), "deepseek": (513, 8, 256, 32)}
RUN = {"cpu": _choose_replicas_triton, "cuda": choose_replicas}


def random_table(num_experts: int, most: int) -> torch.Tensor:
    """Every expert has from 1 to `most` copies, in slots of its own."""
    table = torch.arange(num_experts * most, dtype=torch.int32).reshape(num_experts, most)
    counts = torch.randint(1, most + 1, (num_experts, 1), dtype=torch.int32)
    return torch.cat([counts, table], dim=1)


def test_kernel_equals_reference(device, case):
    num_tokens, num_choices, num_experts, most = case
    experts = torch.randint(-1, num_experts, (num_tokens, num_choices), dtype=torch.int32, device=device)
    table = random_table(num_experts, most).to(device)
    loads, expected_loads = (torch.full((num_experts,), 5, dtype=torch.int64, device=device) for _ in range(2))
    slots = RUN[device](experts, table, loads, first_turn=num_choices)
    assert torch.equal(slots, choose_replicas_ref(experts, table, expected_loads, first_turn=num_choices))
    assert slots.dtype == torch.int32
    assert torch.equal(loads, expected_loads)
    counted = Counter(experts.flatten().tolist())
    assert (loads - 5).tolist() == [counted[expert] for expert in range(num_experts)]
    assert torch.equal(slots < 0, experts < 0)
    assert torch.equal(torch.where(slots < 0, -1, slots // most), experts)


def test_padding_goes_nowhere_and_is_not_counted(device):
    experts = torch.randint(0, 8, (9, 2), dtype=torch.int32, device=device)
    is_padding = torch.arange(9, device=device) % 3 == 1
    table = random_table(8, 3).to(device)
    for run in (RUN[device], choose_replicas_ref):
        loads, expected_loads = (torch.zeros(8, dtype=torch.int64, device=device) for _ in range(2))
        slots = run(experts, table, loads, is_padding_T=is_padding)
        expected = choose_replicas_ref(experts, table, torch.zeros_like(loads)).masked_fill(is_padding[:, None], -1)
        assert torch.equal(slots, expected)
        choose_replicas_ref(experts[~is_padding], table, expected_loads)
        assert torch.equal(loads, expected_loads)


def test_copies_take_turns(device):
    table = torch.tensor([[3, 4, 5, 6], [1, 9, -7, -7]], dtype=torch.int32, device=device)
    experts = torch.tensor([[0, 1]] * 31, dtype=torch.int32, device=device)
    for run in (RUN[device], choose_replicas_ref):
        loads = torch.zeros(2, dtype=torch.int64, device=device)
        slots = run(experts, table, loads)
        assert sorted(Counter(slots[:, 0].tolist()).values()) == [10, 10, 11]
        assert set(slots[:, 1].tolist()) == {9}
        assert torch.equal(run(experts, table, loads, first_turn=2)[:-2], slots[2:])
        # Another table in the same place, as under a captured graph.
        table[0, :2] = torch.tensor([1, 8], dtype=torch.int32)
        assert set(run(experts, table, loads)[:, 0].tolist()) == {8}
        table[0, :2] = torch.tensor([3, 4], dtype=torch.int32)
        assert loads.tolist() == [93, 93]


@pytest.mark.parametrize(
    ("experts", "copies", "loads"),
    [
        (torch.zeros(2, dtype=torch.int32), torch.ones(3, 2, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 1, dtype=torch.int64), torch.ones(3, 2, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 1, dtype=torch.int32), torch.ones(3, 2, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(2, 2, dtype=torch.int32).T, torch.ones(2, 3, dtype=torch.int32).T, torch.zeros(3, dtype=torch.int64)),
    ],
)
def test_misfits_are_refused(experts, copies, loads):
    with pytest.raises(ValueError, match="choose_replicas"):
        choose_replicas(experts, copies, loads)
