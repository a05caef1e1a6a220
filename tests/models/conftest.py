"""Tiny random checkpoints: every weight, norm and bias random, so that nothing that is left out goes unnoticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import family_checkpoints
import pytest
import torch
import transformers

SaveCheckpoint = Callable[..., transformers.PreTrainedModel]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads would only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def save_checkpoint() -> SaveCheckpoint:
    return family_checkpoints.save_checkpoint


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """The directory of a tiny Llama checkpoint, one file, float32."""
    family_checkpoints.save_checkpoint(tmp_path, "LlamaForCausalLM")
    return tmp_path
