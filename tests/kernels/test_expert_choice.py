import pytest
import torch
from pilotfish.kernels.expert_choice import TOLERANCE, _choose_experts_triton, choose_experts, choose_experts_ref
from pilotfish.kernels.expert_scoring import ExpertScoring
from transformers import DeepseekV2Config, DeepseekV3Config, Glm4MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

# (tokens, experts, top_k, groups, chosen groups, group top)
SMALL = {
    "no_groups": (7, 64, 6, 1, 1, 1),
    "deepseek_v2": (3, 160, 6, 8, 3, 1),
    "deepseek_v3": (5, 256, 8, 8, 4, 2),
    "odd": (2, 15, 4, 5, 2, 3),
    "all_groups": (2, 12, 12, 3, 3, 1),
    "empty": (0, 8, 2, 2, 1, 1),
}
LARGE = {"prefill": (3000, 256, 8, 8, 4, 2)}
RUN = {"cpu": _choose_experts_triton, "cuda": choose_experts}


def scoring_of(case, function, scale=1.0):
    return ExpertScoring(function=function, num_groups=case[3], num_chosen_groups=case[4], group_top=case[5], scale=scale)


def assert_same(got, expected, num_experts):
    """The same experts in the same order, and the same weights."""
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[0], expected[0], rtol=TOLERANCE[0], atol=TOLERANCE[1])
    assert got[1].numel() == 0 or 0 <= got[1].min() <= got[1].max() < num_experts


def by_expert(weights_TC, experts_TC, num_experts):
    return torch.zeros(len(weights_TC), num_experts).scatter_(1, experts_TC.long(), weights_TC)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_reference_equals_sigmoid_routers(family, num_groups, renormalize):
    router_class, config_class = {
        "deepseek_v3": (DeepseekV3TopkRouter, DeepseekV3Config),
        "glm4_moe": (Glm4MoeTopkRouter, Glm4MoeConfig),
    }[family]
    config = config_class(
        n_routed_experts=32,
        num_experts_per_tok=5,
        n_group=num_groups,
        topk_group=max(num_groups // 2, 1),
        routed_scaling_factor=2.5,
        norm_topk_prob=renormalize,
        hidden_size=16,
    )
    router, x = router_class(config), torch.randn(50, 16)
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.normal_(std=0.3)
    logits, weights, experts = router(x)
    scoring = ExpertScoring(
        function="sigmoid", num_groups=num_groups, num_chosen_groups=max(num_groups // 2, 1), group_top=2, scale=2.5
    )
    got = choose_experts_ref(logits, 5, renormalize=renormalize, scoring=scoring, correction_E=router.e_score_correction_bias)
    torch.testing.assert_close(by_expert(*got, 32), by_expert(weights, experts, 32))


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_reference_equals_softmax_router(method):
    config = DeepseekV2Config(
        n_routed_experts=32,
        num_experts_per_tok=5,
        n_group=4,
        topk_group=2,
        topk_method=method,
        routed_scaling_factor=16.0,
        hidden_size=16,
        num_attention_heads=4,
    )
    router, x = DeepseekV2TopkRouter(config), torch.randn(50, 16)
    torch.nn.init.normal_(router.weight)
    logits, weights, experts = router(x)
    groups = {} if method == "greedy" else {"num_groups": 4, "num_chosen_groups": 2}
    scoring = ExpertScoring(function="softmax", scale=16.0, **groups)
    got = choose_experts_ref(logits, 5, renormalize=False, scoring=scoring)
    torch.testing.assert_close(by_expert(*got, 32), by_expert(weights, experts, 32))


@pytest.mark.parametrize(
    ("function", "corrected", "renormalize"),  # each two together
    [("softmax", True, False), ("softmax", False, True), ("sigmoid", True, True), ("sigmoid", False, False)],
)
def test_kernel_equals_reference(device, dtype, case, function, corrected, renormalize):
    num_tokens, num_experts, top_k = case[:3]
    # Logits that no two experts share, far enough apart that no rounding of a score swaps them.
    order = torch.stack([torch.randperm(num_experts) for _ in range(num_tokens)]) if num_tokens else torch.zeros(0, num_experts)
    logits = torch.nn.functional.pad(order.to(device) * (8 / num_experts) - 4, (0, 3)).to(dtype)[:, :num_experts]
    correction = torch.randn(num_experts, device=device) * 0.3 if corrected else None
    arguments = {"renormalize": renormalize, "scoring": scoring_of(case, function, 2.5), "correction_E": correction}
    got = RUN[device](logits, top_k, **arguments)
    assert_same(got, choose_experts_ref(logits, top_k, **arguments), num_experts)


def test_of_equals_the_lowest_expert_of_the_lowest_group_comes_first(device):
    logits = torch.zeros(2, 12, device=device)
    logits[1, 9:] = 1.0
    scoring = ExpertScoring(function="sigmoid", num_groups=4, num_chosen_groups=2, group_top=2)
    for run in (RUN[device], choose_experts_ref):
        _, experts = run(logits, 4, renormalize=True, scoring=scoring)
        assert experts.tolist() == [[0, 1, 2, 3], [9, 10, 11, 0]]


def test_a_correction_chooses_but_does_not_weigh(device):
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]], device=device)
    correction = torch.tensor([5.0, 0.0, 0.0, -5.0], device=device)
    for run in (RUN[device], choose_experts_ref):
        weights, experts = run(
            logits, 2, renormalize=False, scoring=ExpertScoring(function="sigmoid", scale=2.0), correction_E=correction
        )
        assert experts.tolist() == [[0, 2]]
        torch.testing.assert_close(weights, 2 * logits[:, [0, 2]].sigmoid())


def test_misfits_are_refused():
    plain = ExpertScoring(function="sigmoid")
    assert ExpertScoring(function="softmax", num_groups=4, num_chosen_groups=4).is_plain
    assert not plain.is_plain
    logits = torch.zeros(2, 12)
    for wrong, top_k, scoring, correction in (
        (torch.zeros(12), 1, plain, None),
        (torch.zeros(12, 2).T, 1, plain, None),
        (logits, 13, plain, None),
        (logits, 1, ExpertScoring(function="sigmoid", num_groups=5), None),
        (logits, 1, ExpertScoring(function="sigmoid", num_groups=4, num_chosen_groups=5), None),
        (logits, 1, ExpertScoring(function="sigmoid", num_groups=4, group_top=4), None),
        (logits, 4, ExpertScoring(function="sigmoid", num_groups=4), None),
        (logits, 1, plain, torch.zeros(11)),
        (logits, 1, plain, torch.zeros(12, dtype=torch.float64)),
    ):
        with pytest.raises(ValueError, match="choose_experts"):
            choose_experts(wrong, top_k, renormalize=True, scoring=scoring, correction_E=correction)
