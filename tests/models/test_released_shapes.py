"""The fields of config.json in the layout of released checkpoints of the sparse families become the right shape."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pilotfish.common.errors import ModelLoadError
from pilotfish.kernels.expert_scoring import ExpertScoring
from pilotfish.models.config_reader import ConfigReader, read_architecture
from pilotfish.models.dummy_shapes import SHAPES
from pilotfish.models.model_shape import ModelShape
from pilotfish.models.registry import lookup
from pilotfish.models.shape_reader import read_shape

# After config.json of deepseek-ai/DeepSeek-V3 (but for its fp8), deepseek-ai/DeepSeek-V2-Lite, zai-org/GLM-4.5-Air,
# openai/gpt-oss-20b (but for its MXFP4) and Qwen/Qwen1.5-MoE-A2.7B.
_YARN = {"type": "yarn", "beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
DEEPSEEK_V2_LITE = DEEPSEEK_V3 | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
GLM_AIR = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "attention_bias": True,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "use_qk_norm": False,
    "vocab_size": 151552,
}
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "vocab_size": 201088,
}
QWEN_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def shape_of(path: Path, config: dict[str, Any]) -> ModelShape:
    (path / "config.json").write_text(json.dumps(config))
    architecture = read_architecture(path)
    return read_shape(ConfigReader(path), lookup(architecture), architecture=architecture)


def test_deepseek_v3(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, DEEPSEEK_V3)
    assert (shape.num_kv_heads, shape.head_dim, shape.rotary.rotary_dim) == (1, 576, 64)
    assert (shape.max_position, shape.num_extra_layers) == (163840, 1)
    assert shape.latent is not None
    assert (shape.latent.q_rank, shape.latent.interleaved) == (1536, True)
    assert shape.latent.scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert shape.moe is not None
    assert (shape.moe.layers, shape.moe.shared_size) == (frozenset(range(3, 61)), 2048)
    assert shape.moe.scoring == ExpertScoring(function="sigmoid", num_groups=8, num_chosen_groups=4, group_top=2, scale=2.5)


def test_deepseek_v2_lite(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, DEEPSEEK_V2_LITE)
    assert shape.latent is not None
    assert shape.latent.q_rank is None
    assert shape.moe is not None
    assert (shape.moe.shared_size, shape.moe.renormalize) == (2816, False)
    assert shape.moe.scoring is not None
    assert shape.moe.scoring.is_plain


def test_glm_air(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, GLM_AIR)
    assert (shape.rotary.rotary_dim, shape.qkv_bias, shape.output_bias, shape.qk_norm) == (64, True, False, False)
    assert shape.num_extra_layers == 1


def test_gpt_oss(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, GPT_OSS_20B)
    assert shape == SHAPES["gpt-oss-20b"]


def test_qwen_moe(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, QWEN_MOE)
    assert shape.windows == (None,) * 24
    assert shape.moe is not None
    assert (shape.moe.shared_size, shape.moe.renormalize) == (5632, False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DEEPSEEK_V2_LITE | {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
        (DEEPSEEK_V2_LITE | {"topk_method": "group_limited_greedy", "topk_group": None}, "topk_method 'group_limited_greedy'"),
        (DEEPSEEK_V2_LITE | {"norm_topk_prob": True}, "norm_topk_prob = True is not supported"),
        (DEEPSEEK_V3 | {"num_key_value_heads": 64}, "num_key_value_heads 64 is not num_attention_heads 128"),
        (DEEPSEEK_V3 | {"quantization_config": {"quant_method": "fp8"}}, r"quantized checkpoints \(fp8\)"),
        (GPT_OSS_20B | {"quantization_config": {"quant_method": "mxfp4"}}, r"quantized checkpoints \(mxfp4\)"),
    ],
)
def test_what_cannot_be_honoured_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=message):
        shape_of(tmp_path, config)
