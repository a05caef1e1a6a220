"""Tiny random checkpoints: every weight, norm and bias random, so that nothing that is left out goes unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import family_checkpoints
import pytest
import transformers

SaveCheckpoint = Callable[..., transformers.PreTrainedModel]


@pytest.fixture(scope="session")
def save_checkpoint() -> SaveCheckpoint:
    return family_checkpoints.save_checkpoint


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """The directory of a tiny Llama checkpoint, one file, float32."""
    family_checkpoints.save_checkpoint(tmp_path, "LlamaForCausalLM")
    return tmp_path
