"""From config.json to the model's shape: both rope layouts, and nothing that changes the result is ignored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pilotfish.common.errors import ModelLoadError
from pilotfish.models.config_reader import ConfigReader, read_architecture
from pilotfish.models.families import llama
from pilotfish.models.family_spec import FamilySpec, Field
from pilotfish.models.model_shape import ModelShape
from pilotfish.models.registry import lookup
from pilotfish.models.shape_reader import read_shape

SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA = SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
QWEN2 = SIZES | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3_MOE = SIZES | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
GLM = SIZES | {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}
MISTRAL = SIZES | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
MIXTRAL = SIZES | {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": 8}


def shape_of(path: Path, config: dict[str, Any], spec: FamilySpec | None = None) -> ModelShape:
    (path / "config.json").write_text(json.dumps(config))
    architecture = read_architecture(path)
    return read_shape(ConfigReader(path), spec or lookup(architecture), architecture=architecture)


def test_older_and_newer_rope_layouts_agree(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    newer = shape_of(tmp_path, LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | scaling})
    older = shape_of(tmp_path, LLAMA | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | scaling})
    oldest = shape_of(tmp_path, LLAMA | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | scaling})
    assert newer == older == oldest
    assert newer.rotary.scaling == "llama3"
    assert newer.rotary.theta == 5e5
    assert newer.rotary.parameters == scaling
    plain = shape_of(tmp_path, LLAMA | {"rope_theta": 5e5, "rope_scaling": None})
    assert (plain.rotary.scaling, plain.rotary.theta) == ("default", 5e5)


def test_yarn_extends_the_positions(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert shape_of(tmp_path, LLAMA | {"rope_theta": 1e4, "rope_scaling": yarn}).max_position == 2048
    assert shape_of(tmp_path, LLAMA).max_position == 512


def test_head_dim_and_kv_heads_default_from_the_heads(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"})
    assert (shape.num_kv_heads, shape.head_dim) == (4, 16)
    assert shape_of(tmp_path, QWEN3_MOE | {"head_dim": 32}).head_dim == 32


def test_windows(tmp_path: Path) -> None:
    window = {"sliding_window": 8}
    assert shape_of(tmp_path, MISTRAL | window).windows == (8,) * 4
    assert shape_of(tmp_path, MISTRAL | {"sliding_window": None}).windows == (None,) * 4
    assert shape_of(tmp_path, QWEN2 | window).windows == (None,) * 4
    from_layer_3 = QWEN2 | window | {"use_sliding_window": True, "max_window_layers": 3}
    assert shape_of(tmp_path, from_layer_3).windows == (None, None, None, 8)
    layer_types = ["sliding_attention", "full_attention"] * 2
    assert shape_of(tmp_path, from_layer_3 | {"layer_types": layer_types}).windows == (8, None, 8, None)
    assert shape_of(tmp_path, QWEN3_MOE | window | {"use_sliding_window": True}).windows == (8,) * 4


def test_a_part_of_a_head_turns(tmp_path: Path) -> None:
    assert shape_of(tmp_path, GLM).rotary.rotary_dim == 8
    assert shape_of(tmp_path, GLM | {"partial_rotary_factor": 0.25}).rotary.rotary_dim == 4
    assert (
        shape_of(tmp_path, GLM | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0}}).rotary.rotary_dim == 16
    )


def test_sparse_layers(tmp_path: Path) -> None:
    moe = shape_of(tmp_path, QWEN3_MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}).moe
    assert moe is not None
    assert moe.layers == {1}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LLAMA | {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
            "'longrope'",
        ),
        (LLAMA | {"rope_scaling": YARN | {"invented": 2.0}}, "does not know invented"),
        (LLAMA | {"rope_scaling": YARN | {"attention_factor": "high"}}, "attention_factor must be a number"),
        (LLAMA | {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}, "does not know mrope_section"),
        (LLAMA | {"rope_theta": 0}, "rope_theta"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA | {"hidden_act": "relu"}, "hidden_act 'relu'"),
        (LLAMA | {"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantized checkpoints \(awq\)"),
        (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers must be a positive"),
        (LLAMA | {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        (LLAMA | {"hidden_size": "wide"}, "transformers .* refuses it"),
        (LLAMA | {"model_type": "qwen2"}, "LlamaForCausalLM goes with model_type 'llama'"),
        (QWEN2 | {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        (QWEN2 | {"layer_types": ["full_attention"] * 3}, "(?s)refuses it.*layer_types"),
        (QWEN2 | {"layer_types": ["sliding_attention"] * 4}, "sliding_window is not set"),
        (MISTRAL | {"layer_types": ["full_attention"] * 4}, "not 'ministral'"),
        (MIXTRAL | {"layer_types": ["full_attention"] * 4}, "layer_types is not supported"),
        (GLM | {"n_group": 3}, "8 experts do not divide into 3 groups"),
        (GLM | {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "3 experts cannot be chosen from 1 groups of 2"),
        (GLM | {"partial_rotary_factor": 0.2}, "3 of a head's 16 numbers cannot turn in pairs"),
        (QWEN3_MOE | {"num_experts_per_tok": 5}, "num_experts_per_tok 5 is more than the 4"),
        (LLAMA | {"per_layer_config": {"1": {"intermediate_size": 32}}}, "per_layer_config"),
    ],
)
def test_what_cannot_be_honoured_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=message) as caught:
        shape_of(tmp_path, config)
    assert str(tmp_path) in caught.value.message


def test_a_declared_field_that_no_one_reads_is_refused(tmp_path: Path) -> None:
    forgetful = replace(llama.SPEC, mlp_bias=False)
    assert not shape_of(tmp_path, LLAMA, forgetful).mlp_bias
    with pytest.raises(ModelLoadError, match="mlp_bias = True is not supported"):
        shape_of(tmp_path, LLAMA | {"mlp_bias": True}, forgetful)


def test_soft_cap_is_a_setting(tmp_path: Path) -> None:
    capped = replace(llama.SPEC, attention_soft_cap=Field("attn_logit_softcapping"))
    assert shape_of(tmp_path, LLAMA | {"attn_logit_softcapping": 50}, capped).attention_soft_cap == 50.0
    assert shape_of(tmp_path, LLAMA, capped).attention_soft_cap is None
