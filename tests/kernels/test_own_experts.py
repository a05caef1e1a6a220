import pytest
import torch
from pilotfish.kernels.own_experts import own_experts, own_experts_ref, own_experts_triton

RUN = {"cpu": own_experts_triton, "cuda": own_experts}


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (3, 2), (700, 8)])
def test_kernel_equals_reference(device, shape):
    experts = torch.randint(-1, 128, shape, dtype=torch.int32, device=device)
    for first in (0, 64, 96):
        expected = own_experts_ref(experts, first=first, num_own=32)
        assert torch.equal(RUN[device](experts, first=first, num_own=32), expected)


def test_each_expert_is_numbered_on_one_rank_alone():
    experts = torch.tensor([[0, 3, 4, 7], [5, 2, 1, 6]], dtype=torch.int32)
    assert own_experts(experts, first=0, num_own=4).tolist() == [[0, 3, -1, -1], [-1, 2, 1, -1]]
    assert own_experts(experts, first=4, num_own=4).tolist() == [[-1, -1, 0, 3], [1, -1, -1, 2]]
    with pytest.raises(ValueError, match="must be contiguous int32"):
        own_experts(experts.long(), first=0, num_own=4)
