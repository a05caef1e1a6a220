"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, and sliding windows from some layer on."""

from __future__ import annotations

from dataclasses import replace

from ..family_spec import window_by_layer_type
from . import llama

SPEC = replace(llama.SPEC, model_type="qwen2", qkv_bias=True, output_bias=False, mlp_bias=False, windows=window_by_layer_type)
