import pytest
import torch
from pilotfish.kernels.biased_moe_mlp import TOLERANCE, biased_moe_mlp, biased_moe_mlp_ref
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

ALPHA, LIMIT = 1.3, 1.5  # the limit is reached often


def make(num_tokens, *, num_experts=5, hidden=24, intermediate=16, top_k=2, dtype=torch.float32):
    gate_up = torch.randn(num_experts, 2 * intermediate, hidden) * 2 / hidden**0.5
    down = torch.randn(num_experts, hidden, intermediate) / intermediate**0.5
    biases = torch.randn(num_experts, 2 * intermediate), torch.randn(num_experts, hidden)
    experts = (
        torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(num_tokens)]) if num_tokens else torch.zeros(0, top_k)
    )
    weights = torch.rand(num_tokens, top_k)
    tensors = [x.to(dtype) for x in (torch.randn(num_tokens, hidden), gate_up, biases[0], down, biases[1])]
    return [*tensors, weights, experts.to(torch.int32)]


@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_equals_gpt_oss(num_tokens):
    x, gate_up, gate_up_bias, down, down_bias, weights, experts = make(num_tokens)
    config = GptOssConfig(hidden_size=24, intermediate_size=16, num_local_experts=5, swiglu_alpha=ALPHA, swiglu_limit=LIMIT)
    theirs = GptOssExperts(config).double()
    interleaved = gate_up.view(5, 2, 16, 24).permute(0, 3, 2, 1).reshape(5, 24, 32)
    with torch.no_grad():
        theirs.gate_up_proj.copy_(interleaved)
        theirs.gate_up_proj_bias.copy_(gate_up_bias.view(5, 2, 16).transpose(1, 2).reshape(5, 32))
        theirs.down_proj.copy_(down.transpose(1, 2))
        theirs.down_proj_bias.copy_(down_bias)
        expected = theirs(x.double(), experts.long(), weights.double())
    out = biased_moe_mlp(x, gate_up, gate_up_bias, down, down_bias, weights, experts, alpha=ALPHA, limit=LIMIT)
    rtol, atol = TOLERANCE[torch.float32]
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_numbers_are_close_to_wide_ones(dtype):
    tensors = make(9, dtype=dtype)
    out = biased_moe_mlp(*tensors, alpha=ALPHA, limit=LIMIT)
    expected = biased_moe_mlp_ref(*[x if x.dtype == torch.int32 else x.float() for x in tensors], alpha=ALPHA, limit=LIMIT)
    rtol, atol = TOLERANCE[dtype]
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=rtol, atol=atol)


def test_ranks_share_the_intermediate_dimension_and_one_adds_the_bias():
    x, gate_up, gate_up_bias, down, down_bias, weights, experts = make(7)
    options = {"alpha": ALPHA, "limit": LIMIT}
    whole = biased_moe_mlp(x, gate_up, gate_up_bias, down, down_bias, weights, experts, **options)
    parts = []
    for rank in range(2):
        mine = slice(8 * rank, 8 * rank + 8)
        weight = gate_up.view(5, 2, 16, 24)[:, :, mine].reshape(5, 16, 24)
        bias = gate_up_bias.view(5, 2, 16)[:, :, mine].reshape(5, 16)
        added = down_bias if rank == 0 else None
        parts.append(biased_moe_mlp(x, weight, bias, down[..., mine], added, weights, experts, **options))
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-4, atol=1e-5)


def test_experts_of_another_rank_add_nothing():
    *tensors, weights, experts = make(7)
    kept = biased_moe_mlp(*tensors, weights * (experts < 2), experts, alpha=ALPHA, limit=LIMIT)
    out = biased_moe_mlp(*tensors, weights, experts.where(experts < 2, -1), alpha=ALPHA, limit=LIMIT)
    torch.testing.assert_close(out, kept)


@pytest.mark.parametrize("index", range(7))
def test_misfits_are_refused(index):
    tensors = make(3)
    tensors[index] = tensors[index][..., :-1]
    with pytest.raises(ValueError, match="biased_moe_mlp"):
        biased_moe_mlp(*tensors, alpha=ALPHA, limit=LIMIT)
