"""Qwen3: Qwen2 with a norm on each query and key head in place of the biases."""

from __future__ import annotations

from dataclasses import replace

from ..family_spec import Field
from . import qwen2

SPEC = replace(
    qwen2.SPEC, model_type="qwen3", qkv_bias=Field("attention_bias"), output_bias=Field("attention_bias"), qk_norm=True
)
