"""Rotary tables against transformers' own frequencies, with the numbers of released models, up to their last position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pilotfish.models.layers.rotary import SCALINGS, RotaryTable
from pilotfish.models.model_shape import RotaryShape
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

LLAMA_3_1 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
QWEN = {"factor": 4.0, "original_max_position_embeddings": 32768}
LAST = torch.tensor([0, 1, 4095, 32767, 65535, 131071])


@pytest.mark.parametrize(
    ("scaling", "theta", "parameters"),
    [
        ("linear", 10000.0, {"factor": 2.5}),
        ("dynamic", 10000.0, {"factor": 4.0}),
        ("llama3", 500000.0, LLAMA_3_1),
        ("yarn", 1e6, QWEN),
        ("yarn", 1e6, QWEN | {"attention_factor": 0.8}),
        ("yarn", 1e4, QWEN | {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.3, "beta_fast": 24.0, "beta_slow": 2.0}),
        ("yarn", 1.5e5, QWEN | {"truncate": False, "original_max_position_embeddings": 4096}),
    ],
)
def test_tables_equal_transformers(scaling: str, theta: float, parameters: dict[str, Any]) -> None:
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": scaling, "rope_theta": theta, **parameters},
    )
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[scaling](config)
    rotary = RotaryShape(theta=theta, rotary_dim=128, scaling=scaling, parameters=parameters)
    table = RotaryTable(rotary, 131072, device=torch.device("cpu"))
    angle = LAST.float().unsqueeze(1) * inv_freq
    # A frequency off by one unit in the last place turns position 131071 by up to 0.008.
    tolerance = {"rtol": 0, "atol": 1e-3}
    torch.testing.assert_close(table.cos_PC[LAST], angle.cos() * attention_factor, **tolerance)
    torch.testing.assert_close(table.sin_PC[LAST], angle.sin() * attention_factor, **tolerance)


def test_every_scaling_is_covered_here_or_by_parity() -> None:
    assert set(SCALINGS) == {"default", "linear", "dynamic", "llama3", "yarn"}
