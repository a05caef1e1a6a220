"""The shapes that benchmarks run by name: those of some checkpoints on the Hugging Face Hub, and two tiny ones.

`dummy:<shape>` stands where a model's name would; dummy.py makes the weights.

Sources: config.json of Qwen/Qwen3-0.6B, Qwen/Qwen3-8B, Qwen/Qwen3-30B-A3B and openai/gpt-oss-20b (here in 16 bits).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace

from ..common.errors import ModelNotFound
from ..kernels.clamped_gate import ClampedGate
from .model_shape import ModelShape, MoeShape, RotaryShape

DUMMY_PREFIX = "dummy:"

_QWEN3_06B = ModelShape(
    architecture="Qwen3ForCausalLM",
    num_layers=28,
    hidden_size=1024,
    intermediate_size=3072,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=151936,
    max_position=40960,
    norm_eps=1e-6,
    activation="silu",
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=True,
    attention_soft_cap=None,
    tied_embeddings=True,
    rotary=RotaryShape(theta=1e6, rotary_dim=128, scaling="default", parameters={}),
    windows=(None,) * 28,
    moe=None,
)

_QWEN3_8B = replace(
    _QWEN3_06B,
    num_layers=36,
    hidden_size=4096,
    intermediate_size=12288,
    num_heads=32,
    tied_embeddings=False,
    windows=(None,) * 36,
)

_QWEN3_30B_A3B = replace(
    _QWEN3_06B,
    architecture="Qwen3MoeForCausalLM",
    num_layers=48,
    hidden_size=2048,
    intermediate_size=6144,
    num_heads=32,
    num_kv_heads=4,
    tied_embeddings=False,
    windows=(None,) * 48,
    moe=MoeShape(layers=frozenset(range(48)), num_experts=128, top_k=8, intermediate_size=768, renormalize=True),
)

_GPT_OSS_20B = ModelShape(
    architecture="GptOssForCausalLM",
    num_layers=24,
    hidden_size=2880,
    intermediate_size=2880,
    num_heads=64,
    num_kv_heads=8,
    head_dim=64,
    vocab_size=201088,
    max_position=131072,
    norm_eps=1e-5,
    activation="silu",
    qkv_bias=True,
    output_bias=True,
    mlp_bias=False,
    qk_norm=False,
    attention_soft_cap=None,
    tied_embeddings=False,
    rotary=RotaryShape(
        theta=150000.0,
        rotary_dim=64,
        scaling="yarn",
        parameters={
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
    ),
    windows=(128, None) * 12,
    moe=MoeShape(
        layers=frozenset(range(24)),
        num_experts=32,
        top_k=4,
        intermediate_size=2880,
        renormalize=True,
        bias=True,
        clamped_gate=ClampedGate(alpha=1.702, limit=7.0),
    ),
    sinks=True,
)

# For tests and for trying a command on a CPU.
_TINY = replace(
    _QWEN3_06B,
    num_layers=2,
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=512,
    max_position=1024,
    rotary=RotaryShape(theta=1e6, rotary_dim=32, scaling="default", parameters={}),
    windows=(None,) * 2,
)

_TINY_MOE = replace(
    _TINY,
    architecture="Qwen3MoeForCausalLM",
    tied_embeddings=False,
    moe=MoeShape(layers=frozenset(range(2)), num_experts=8, top_k=2, intermediate_size=32, renormalize=True),
)

SHAPES: Mapping[str, ModelShape] = {
    "qwen3-0.6b": _QWEN3_06B,
    "qwen3-8b": _QWEN3_8B,
    "qwen3-30b-a3b": _QWEN3_30B_A3B,
    "gpt-oss-20b": _GPT_OSS_20B,
    "tiny": _TINY,
    "tiny-moe": _TINY_MOE,
}


def is_dummy(model: str) -> bool:
    """Whether a model's name asks for random weights."""
    return model.startswith(DUMMY_PREFIX)


def dummy_shape(model: str) -> ModelShape:
    """The shape that `dummy:<shape>` names. ModelNotFound that lists them where there is none."""
    name = model.removeprefix(DUMMY_PREFIX)
    if name not in SHAPES:
        near = difflib.get_close_matches(name, SHAPES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ModelNotFound(f"no dummy shape is called {name!r}: {hint}There are {', '.join(SHAPES)}")
    return SHAPES[name]
