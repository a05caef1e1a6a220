"""Files that are missing, truncated, corrupt or contradict each other: named, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pilotfish.common.errors import ModelLoadError
from pilotfish.models.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from safetensors.torch import save_file


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards with two tensors each, and their index."""
    weight_map = {}
    for shard in range(2):
        file = f"model-0000{shard + 1}-of-00002.safetensors"
        tensors = {f"{name}{shard}": torch.arange(6.0).view(2, 3) + 10 * shard for name in ("a", "b")}
        save_file(tensors, tmp_path / file)
        weight_map |= dict.fromkeys(tensors, file)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def test_headers_and_slices(shards: Path) -> None:
    with Checkpoint(shards) as checkpoint:
        assert list(checkpoint.tensors) == ["a0", "b0", "a1", "b1"]
        stored = checkpoint.tensors["b1"]
        assert (stored.file, stored.dtype, stored.shape) == ("model-00002-of-00002.safetensors", "F32", (2, 3))
        assert checkpoint.read("b1", (slice(1, 2), slice(0, 2))).tolist() == [[13.0, 14.0]]


@pytest.mark.parametrize("keep", [0, 7, 40, -1])
def test_truncated_file(keep: int, shards: Path) -> None:
    file = shards / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=r"model-00002-of-00002\.safetensors is truncated or corrupt.*download it again"):
        Checkpoint(shards)


def test_corrupt_header(shards: Path) -> None:
    file = shards / "model-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[8:20] = b"\xff" * 12
    file.write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"model-00001-of-00002\.safetensors is truncated or corrupt"):
        Checkpoint(shards)


def test_missing_shard(shards: Path) -> None:
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"model-00002-of-00002\.safetensors is missing"):
        Checkpoint(shards)


def test_shard_without_a_tensor_that_the_index_places_there(shards: Path) -> None:
    save_file({"a1": torch.zeros(2, 3)}, shards / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelLoadError, match=r"model-00002-of-00002\.safetensors lacks b1"):
        Checkpoint(shards)


def test_tensor_in_two_shards(shards: Path) -> None:
    save_file(
        {"a1": torch.zeros(2, 3), "b1": torch.zeros(2, 3), "a0": torch.zeros(2, 3)}, shards / "model-00002-of-00002.safetensors"
    )
    with pytest.raises(ModelLoadError, match="repeats the tensor a0"):
        Checkpoint(shards)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a0": 5}}'])
def test_index_that_is_none(index: str, shards: Path) -> None:
    (shards / INDEX_FILE).write_text(index)
    with pytest.raises(ModelLoadError, match="is not a valid index"):
        Checkpoint(shards)


def test_index_that_leaves_the_directory(shards: Path) -> None:
    (shards / INDEX_FILE).write_text('{"weight_map": {"a0": "../other.safetensors"}}')
    with pytest.raises(ModelLoadError, match=r"\.\./other\.safetensors outside"):
        Checkpoint(shards)


def test_one_file_goes_before_an_index(shards: Path) -> None:
    save_file({"alone": torch.zeros(1)}, shards / SINGLE_FILE)
    with Checkpoint(shards) as checkpoint:
        assert list(checkpoint.tensors) == ["alone"]


def test_no_weights_or_others(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="found no weights"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelLoadError, match=r"found only pytorch_model\.bin: convert it"):
        Checkpoint(tmp_path)
