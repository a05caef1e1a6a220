"""A GGUF file's metadata as a Hugging Face config.json.

GGUF keys: the `{architecture}.*` section of the GGUF specification (ggml's docs/gguf.md). Every key of that section is either
translated, checked or listed as unused; one that is none of these is an error, because a config without it would load and then
compute something else. rope_theta and rope_scaling are at the top level, where every version of transformers finds them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..common.errors import ModelLoadError

Metadata = Mapping[str, Any]
USE_CHECKPOINT = "use the model's safetensors checkpoint instead"


@dataclass(frozen=True, kw_only=True)
class GgufArchitecture:
    """How llama.cpp's name for an architecture maps to Hugging Face's.

    Attributes:
        interleaved_rotary: q and k rows are stored with each rotary pair side by side (llama.cpp's order), not half by half.
        config: what the architecture implies and the file does not say.
        keys: translated in addition to those that all architectures share.
        experts: the name of a layer's MoE block, and of its gate, up and down weights.
    """

    model_type: str
    class_name: str
    interleaved_rotary: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    experts: tuple[str, str, str, str] | None = None


_ARCHITECTURES = {
    "llama": GgufArchitecture(model_type="llama", class_name="LlamaForCausalLM", interleaved_rotary=True),
    "llama-moe": GgufArchitecture(
        model_type="mixtral",
        class_name="MixtralForCausalLM",
        interleaved_rotary=True,
        config={"sliding_window": None},
        keys={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        experts=("block_sparse_moe", "w1", "w3", "w2"),
    ),
    "qwen2": GgufArchitecture(model_type="qwen2", class_name="Qwen2ForCausalLM"),
    "qwen3": GgufArchitecture(model_type="qwen3", class_name="Qwen3ForCausalLM"),
    "qwen3moe": GgufArchitecture(
        model_type="qwen3_moe",
        class_name="Qwen3MoeForCausalLM",
        config={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        keys={
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        experts=("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
}
_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
_UNUSED = ("vocab_size", "expert_count")  # the embedding says the first, a dense model may say zero experts


def find_architecture(metadata: Metadata) -> GgufArchitecture:
    name = str(metadata.get("general.architecture"))
    if name == "llama" and metadata.get("llama.expert_count", 0):
        name = "llama-moe"
    if name not in _ARCHITECTURES:
        known = ", ".join(sorted({"llama", *_ARCHITECTURES} - {"llama-moe"}))
        raise ModelLoadError(f"the GGUF architecture {name!r} cannot be converted (these can: {known}); {USE_CHECKPOINT}")
    return _ARCHITECTURES[name]


def hf_config(
    metadata: Metadata, *, vocab_size: int, tensor_names: Collection[str], rope_factors: np.ndarray | None
) -> dict[str, Any]:
    """The config.json of a model in bfloat16.

    Args:
        vocab_size: rows of the embedding.
        rope_factors: the file's rope_freqs.weight, float32 of [head_dim / 2], or None.

    Raises:
        ModelLoadError: the file lacks a key, or says something that the config could not say.
    """
    architecture = find_architecture(metadata)
    keys = {**_KEYS, **architecture.keys}
    section = _section(metadata, keys)
    config: dict[str, Any] = {"architectures": [architecture.class_name], "model_type": architecture.model_type}
    config |= {name: section[key] for key, name in keys.items()}
    config |= architecture.config
    config |= token_ids(metadata)
    config |= {
        "vocab_size": vocab_size,
        "hidden_act": "silu",
        "attention_bias": architecture.model_type == "llama" and "blk.0.attn_q.bias" in tensor_names,
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "torch_dtype": "bfloat16",
    }
    if rope_factors is not None:
        config["rope_scaling"] = _llama3_rope_scaling(rope_factors, theta=config["rope_theta"])
    return config


def _section(metadata: Metadata, keys: Collection[str]) -> dict[str, Any]:
    """The architecture's own metadata, with llama.cpp's defaults filled in and everything checked that is not translated."""
    prefix = f"{metadata['general.architecture']}."
    section = {key.removeprefix(prefix): _plain(value) for key, value in metadata.items() if key.startswith(prefix)}
    num_heads = section.get("attention.head_count")
    defaults = {"attention.head_count_kv": num_heads, "rope.freq_base": 10000.0}
    if isinstance(num_heads, int) and num_heads:
        defaults["attention.key_length"] = section.get("embedding_length", 0) // num_heads
    section = {**defaults, **section}
    for key in keys:
        if key not in section:
            raise ModelLoadError(f"the GGUF file does not say {prefix}{key}; it is damaged, get it again")
    head_dim = section["attention.key_length"]
    allowed = {"attention.value_length": head_dim, "rope.dimension_count": head_dim, "rope.scaling.type": "none"}
    for key, value in section.items():
        unknown = key not in keys and key not in allowed and key not in _UNUSED
        if unknown or isinstance(value, list) or value != allowed.get(key, value):
            raise ModelLoadError(f"the GGUF file says {prefix}{key} = {value!r}, which cannot be converted; {USE_CHECKPOINT}")
    return section


def token_ids(metadata: Metadata) -> dict[str, Any]:
    """bos, eos and pad as config.json and generation_config.json name them; eos is a list where a turn ends differently."""
    bos, eos, end_of_turn, pad = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding"))
    both = [eos, end_of_turn] if end_of_turn is not None and end_of_turn != eos else eos
    ids = {"bos_token_id": bos, "eos_token_id": both, "pad_token_id": pad}
    return {name: value for name, value in ids.items() if value is not None}


def _plain(value: Any) -> Any:
    """GGUF rounds numbers to float32: the shortest decimal that rounds to the same one is what the model's author wrote."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _llama3_rope_scaling(factors: np.ndarray, *, theta: float) -> dict[str, Any]:
    """Llama 3.1 and later carry the divisors of the rotary frequencies in place of the parameters they came from.

    Those parameters were published with the models and differ in the factor alone, which is the largest divisor; the divisors
    computed from them must equal the file's.
    """
    factor, low, high, original_len = float(factors.max()), 1.0, 4.0, 8192
    wavelength = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    smooth = np.clip((original_len / wavelength - low) / (high - low), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(factors, expected, rtol=1e-4):
        raise ModelLoadError(f"the GGUF file scales rotary frequencies in an unknown way; {USE_CHECKPOINT}")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original_len,
    }
