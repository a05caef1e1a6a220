import pytest
import torch
from pilotfish.kernels.moe_routing import TOLERANCE, _route_tokens_triton, route_tokens, route_tokens_ref
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

# (tokens, experts, top_k)
SMALL = {"mixtral": (7, 8, 2), "all": (3, 4, 4), "one": (5, 6, 1), "empty": (0, 8, 2), "odd": (4, 60, 6), "single": (3, 1, 1)}
LARGE = {"qwen3": (4096, 128, 8), "many": (1000, 512, 10)}
RUN = {"cpu": _route_tokens_triton, "cuda": route_tokens}


@pytest.mark.parametrize(
    "router",
    [
        MixtralTopKRouter(MixtralConfig(hidden_size=16, num_local_experts=8, num_experts_per_tok=2)),
        Qwen3MoeTopKRouter(Qwen3MoeConfig(hidden_size=16, num_experts=12, num_experts_per_tok=4, norm_topk_prob=True)),
        Qwen3MoeTopKRouter(Qwen3MoeConfig(hidden_size=16, num_experts=12, num_experts_per_tok=4, norm_topk_prob=False)),
    ],
)
def test_reference_equals_transformers(router):
    router.weight.data = torch.randn_like(router.weight)
    logits, expected_weights, expected_experts = router(torch.randn(9, 16))
    weights, experts = route_tokens_ref(logits, router.top_k, renormalize=getattr(router, "norm_topk_prob", True))
    assert torch.equal(experts, expected_experts.to(torch.int32))
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("renormalize", [True, False])
def test_kernel_equals_reference(device, dtype, case, renormalize):
    num_tokens, num_experts, top_k = case
    logits = (torch.randn(num_tokens, num_experts + 3, device=device) * 2).to(dtype)[:, :num_experts]
    weights, experts = RUN[device](logits, top_k, renormalize=renormalize)
    expected_weights, expected_experts = route_tokens_ref(logits, top_k, renormalize=renormalize)
    assert torch.equal(experts, expected_experts)
    torch.testing.assert_close(weights, expected_weights, rtol=TOLERANCE[0], atol=TOLERANCE[1])


def test_of_equal_logits_the_lowest_expert_comes_first(device):
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0]], device=device)
    for run in (RUN[device], route_tokens_ref):
        _, experts = run(logits, 4, renormalize=True)
        assert experts.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


def test_experts_switched_off_are_not_chosen(device):
    logits = torch.tensor([[-float("inf"), 1.0, -float("inf"), 2.0]], device=device)
    weights, experts = RUN[device](logits, 3, renormalize=True)
    assert experts.tolist() == [[3, 1, 0]]
    assert weights[0, 2] == 0


def test_misfits_are_refused():
    for logits, top_k in ((torch.zeros(2, 4), 5), (torch.zeros(2, 4), 0), (torch.zeros(4), 1), (torch.zeros(4, 2).T, 1)):
        with pytest.raises(ValueError, match="route_tokens"):
            route_tokens(logits, top_k, renormalize=True)


def test_zeros_of_either_sign_are_equal_and_tiny_logits_keep_their_order(device, dtype):
    tiny = torch.finfo(dtype).smallest_normal
    logits = torch.tensor([[-tiny, -0.0, 0.0, tiny, -1.0, -float("inf")]], device=device, dtype=dtype)
    for run in (RUN[device], route_tokens_ref):
        _, experts = run(logits, 6, renormalize=True)
        assert experts.tolist() == [[3, 1, 2, 0, 4, 5]]


@pytest.mark.parametrize("sixteen_bits", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_logits_keep_their_order(device, sixteen_bits):
    """Numbers of every size and sign: the experts are those of torch's stable sort."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device).view(sixteen_bits)
    every = every[every.isfinite()]
    logits = torch.stack([every[start:][:60000:61] for start in (0, 17, 40)])
    logits = logits[:, torch.randperm(logits.shape[1], device=device)]
    for top_k in (1, 20):
        _, experts = RUN[device](logits, top_k, renormalize=True)
        assert torch.equal(experts, route_tokens_ref(logits, top_k, renormalize=True)[1])
