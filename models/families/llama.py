"""Llama, and what is Llama but for a sliding window: Mistral. SmolLM2, Yi and many more call themselves Llama."""

from __future__ import annotations

from dataclasses import replace

from ..family_spec import FamilySpec, Field, same_window

SPEC = FamilySpec(
    model_type="llama",
    qkv_bias=Field("attention_bias"),
    output_bias=Field("attention_bias"),
    mlp_bias=Field("mlp_bias"),
    qk_norm=False,
)

MISTRAL = replace(SPEC, model_type="mistral", qkv_bias=False, output_bias=False, mlp_bias=False, windows=same_window)
