"""Experts with biases and a clamped gate, as gpt-oss has them: moe_mlp against transformers, and its kernels against it."""

import pytest
import torch
from pilotfish.kernels.clamped_gate import ClampedGate
from pilotfish.kernels.expert_terms import sum_terms
from pilotfish.kernels.grouped_tiles import GroupedConfig
from pilotfish.kernels.moe_config import MoeSizes, _serves, choose_config, gemv_block_k, rule, table_config
from pilotfish.kernels.moe_gemv import GemvConfig
from pilotfish.kernels.moe_mlp import TOLERANCE, _moe_mlp_triton, moe_mlp, moe_mlp_ref, run_experts
from pilotfish.kernels.streaming_experts import StreamingConfig
from pilotfish.kernels.tall_experts import TallConfig
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

GATE = ClampedGate(alpha=1.3, limit=1.5)  # the limit is reached often
RUN = {
    "cpu": lambda *args, **biases: sum_terms(_moe_mlp_triton(*args, **biases)),
    "cuda": lambda *args, **biases: sum_terms(moe_mlp(*args, **biases)),
}
# (tokens, hidden, intermediate, experts, top_k)
SMALL = {
    "one": (1, 40, 24, 5, 2),
    "few": (7, 40, 24, 5, 2),
    "empty": (0, 40, 24, 5, 2),
    "untouched_experts": (3, 32, 16, 12, 3),
    "two_tiles": (40, 16, 16, 2, 1),
}
LARGE = {f"gpt_oss_{num_tokens}": (num_tokens, 2880, 2880, 32, 4) for num_tokens in (1, 4, 33, 300, 2000)}
CPU_CASES = {torch.float16: {"one", "few"}}
CUDA_CASES = {torch.float32: {"few", "two_tiles"}, torch.float16: {"one", "few", "gpt_oss_33"}}


def make(case, device="cpu", dtype=torch.float32):
    """(arguments, biases)."""
    num_tokens, hidden, intermediate, num_experts, top_k = case
    on = {"device": device, "dtype": dtype}
    gate_up = torch.randn(num_experts, 2 * intermediate, hidden, **on) * 1.5 * hidden**-0.5
    down = torch.randn(num_experts, hidden, intermediate, **on) * intermediate**-0.5
    experts = torch.rand(num_tokens, num_experts, device=device).topk(top_k).indices.int()
    weights = torch.rand(num_tokens, top_k, device=device)
    biases = {
        "gate_up_bias_EU": torch.randn(num_experts, 2 * intermediate, **on),
        "down_bias_EH": torch.randn(num_experts, hidden, **on),
    }
    return (torch.randn(num_tokens, hidden, **on), gate_up, down, weights, experts), biases


def assert_close(out, expected):
    rtol, atol = TOLERANCE[out.dtype]
    torch.testing.assert_close(out, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("num_tokens", [0, 13])
def test_reference_equals_gpt_oss(num_tokens):
    (x, gate_up, down, weights, experts), biases = make((num_tokens, 24, 16, 5, 2))
    config = GptOssConfig(
        hidden_size=24, intermediate_size=16, num_local_experts=5, swiglu_alpha=GATE.alpha, swiglu_limit=GATE.limit
    )
    theirs = GptOssExperts(config).double()
    with torch.no_grad():
        theirs.gate_up_proj.copy_(gate_up.view(5, 2, 16, 24).permute(0, 3, 2, 1).reshape(5, 24, 32))
        theirs.gate_up_proj_bias.copy_(biases["gate_up_bias_EU"].view(5, 2, 16).transpose(1, 2).reshape(5, 32))
        theirs.down_proj.copy_(down.transpose(1, 2))
        theirs.down_proj_bias.copy_(biases["down_bias_EH"])
        expected = theirs(x.double(), experts.long(), weights.double())
    assert_close(moe_mlp(x, gate_up, down, weights, experts, GATE, **biases), expected.float())


def test_kernel_equals_reference(device, dtype, case):
    arguments, biases = make(case, device, dtype)
    assert_close(RUN[device](*arguments, GATE, **biases), moe_mlp_ref(*arguments, GATE, **biases))


CONFIGS = [
    GemvConfig(block_n=8, block_k=32, num_warps=4),
    GroupedConfig(block_m=16, block_n=32, block_k=32, num_warps=4, num_stages=3, prefetch_lines=2),
    GroupedConfig(block_m=64, block_n=32, block_k=32, num_warps=4, num_stages=3, tma=True),
    GroupedConfig(block_m=64, block_n=32, block_k=32, num_warps=4, num_stages=3, tma=True, persistent=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["gemv", "grouped", "tma", "persistent"])
def test_every_triton_kernel_adds_biases_where_experts_are_this_ranks(device, config):
    dtype = torch.float16 if getattr(config, "tma", False) else torch.float32  # TMA wants 16 bits
    (x, gate_up, down, weights, experts), biases = make((7, 40, 24, 3, 2), device, dtype)
    experts[1::3, 0] = -1
    experts[2] = -1
    arguments = (x, gate_up, down, weights, experts)
    expected = moe_mlp_ref(x, gate_up, down, weights * (experts >= 0), experts.clamp(min=0), GATE, **biases)
    out = sum_terms(run_experts(*arguments, GATE, gate_up=config, down=config, **biases))
    assert not out[2].any()
    assert_close(out, expected)
    assert_close(moe_mlp_ref(*arguments, GATE, **biases), expected)


def test_a_rank_that_shares_experts_leaves_the_last_bias_to_another(device):
    (x, gate_up, down, weights, experts), biases = make((7, 40, 24, 5, 2), device)
    expected = RUN[device](x, gate_up, down, weights, experts, GATE, **biases)
    parts = []
    for rank in range(2):
        mine = slice(12 * rank, 12 * rank + 12)
        rows = gate_up.view(5, 2, 24, 40)[:, :, mine].reshape(5, 24, 40)
        first = biases["gate_up_bias_EU"].view(5, 2, 24)[:, :, mine].reshape(5, 24)
        second = biases["down_bias_EH"] if rank == 0 else None
        own = (x, rows, down[..., mine], weights, experts)
        parts.append(RUN[device](*own, GATE, gate_up_bias_EU=first, down_bias_EH=second))
    assert_close(parts[0] + parts[1], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 8, 64])
def test_a_captured_layer_follows_its_inputs(num_tokens):
    case = (num_tokens, 256, 128, 16, 4)
    arguments, biases = make(case, "cuda", torch.bfloat16)
    RUN["cuda"](*arguments, GATE, **biases)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = RUN["cuda"](*arguments, GATE, **biases)
    for _ in range(3):
        others, _ = make(case, "cuda", torch.bfloat16)
        for argument, other in zip(arguments, others, strict=True):
            argument.copy_(other)
        graph.replay()
        assert torch.equal(out, RUN["cuda"](*others, GATE, **biases))


STREAMING = StreamingConfig(tile=64, rows=8, num_stages=4, programs=50)
TALL = TallConfig(most_pairs=192, num_stages=3)


def test_kernels_that_know_no_biases_do_not_serve():
    weight = torch.empty(4, 64, 64, dtype=torch.bfloat16)
    served = [_serves(config, weight, weight.dtype, gated=True, plain=False) for config in (*CONFIGS, STREAMING, TALL)]
    assert served == [True] * len(CONFIGS) + [False, False]


@pytest.mark.gpu
@pytest.mark.parametrize("config", [STREAMING, TALL])
def test_where_the_table_names_such_a_kernel_the_rule_decides(config, monkeypatch):
    sizes = MoeSizes(num_tokens=64, num_choices=4, num_experts=4, hidden=256, intermediate=256)
    weight = torch.empty(4, 512, 256, dtype=torch.bfloat16, device="cuda")
    monkeypatch.setattr("pilotfish.kernels.tuning.lookup", lambda *_: table_config(config))
    choices = [choose_config("moe_gate_up", sizes, weight[0], weight, plain=plain) for plain in (True, False)]
    assert choices == [config, rule("moe_gate_up", sizes, element_size=2)]


def test_steps_of_a_matrix_vector_kernel_fill_its_threads():
    assert [gemv_block_k(size, most=2048) for size in (2048, 4096, 768, 384, 2880, 704, 48)] == [
        2048,
        2048,
        256,
        128,
        1024,
        256,
        64,
    ]
    assert [gemv_block_k(size, most=256) for size in (768, 384, 2880, 24)] == [256, 128, 256, 32]


@pytest.mark.parametrize("change", ["shape", "strides", "dtype"])
@pytest.mark.parametrize("name", ["gate_up_bias_EU", "down_bias_EH"])
def test_biases_that_do_not_fit_are_refused(name, change):
    arguments, biases = make((3, 24, 16, 4, 2))
    bias = biases[name]
    changed = {"shape": bias[:, :-1].contiguous(), "strides": bias.T.contiguous().T, "dtype": bias.half()}[change]
    with pytest.raises(ValueError, match=name.rsplit("_", 1)[0]):
        moe_mlp(*arguments, GATE, **(biases | {name: changed}))
