"""Which architectures are known, and where their family spec lies.

A family file is imported when its architecture is asked for.
"""

from __future__ import annotations

import difflib
import importlib

from ..common.errors import ModelLoadError
from .family_spec import FamilySpec

# Name in config.json -> "module:object" below models/families.
ARCHITECTURES: dict[str, str] = {
    "DeepseekV2ForCausalLM": "deepseek:V2",
    "DeepseekV3ForCausalLM": "deepseek:V3",
    "Glm4MoeForCausalLM": "glm4_moe:SPEC",
    "GptOssForCausalLM": "gpt_oss:SPEC",
    "LlamaForCausalLM": "llama:SPEC",
    "MistralForCausalLM": "llama:MISTRAL",
    "MixtralForCausalLM": "mixtral:SPEC",
    "Qwen2ForCausalLM": "qwen2:SPEC",
    "Qwen2MoeForCausalLM": "qwen2_moe:SPEC",
    "Qwen3ForCausalLM": "qwen3:SPEC",
    "Qwen3MoeForCausalLM": "qwen3_moe:SPEC",
}


def lookup(architecture: str) -> FamilySpec:
    """The architecture's family. ModelLoadError that names the nearest known ones where there is none."""
    if architecture not in ARCHITECTURES:
        near = difflib.get_close_matches(architecture, ARCHITECTURES, n=3, cutoff=0.5)
        known = f"nearest known: {', '.join(near)}" if near else f"known: {', '.join(sorted(ARCHITECTURES))}"
        raise ModelLoadError(f"architecture {architecture!r} is not supported ({known})")
    module, _, name = ARCHITECTURES[architecture].partition(":")
    spec = getattr(importlib.import_module(f".families.{module}", __package__), name)
    assert isinstance(spec, FamilySpec)
    return spec
