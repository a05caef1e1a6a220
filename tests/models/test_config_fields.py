"""What transformers made of a config.json is kept: the same file is read again without it, and says the same."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from pilotfish.models.config_fields import ConfigFields, read_fields
from transformers import AutoConfig, PreTrainedConfig

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
CONFIGS = [
    SIZES | {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "mlp_bias": True},
    SIZES | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1, "torch_dtype": "bfloat16"},
    SIZES | {"model_type": "mixtral", "num_local_experts": 3},
    SIZES | {"model_type": "glm4_moe", "n_routed_experts": 6, "num_nextn_predict_layers": 2, "invented": [1, 2.5, None]},
]
TRANSLATED = {"rope_theta", "rope_scaling", "torch_dtype"}  # into rope_parameters and dtype


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PILOTFISH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/configs"


def write(directory: Path, config: dict[str, Any]) -> Path:
    file = directory / "config.json"
    file.write_text(json.dumps(config))
    return file


def read_without_transformers(file: Path, monkeypatch: pytest.MonkeyPatch) -> ConfigFields:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)  # importing it fails
        return read_fields(file)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config["model_type"])
def test_what_is_kept_is_what_transformers_says(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, config)
    first = read_fields(file)
    assert read_without_transformers(file, monkeypatch) == first
    theirs = AutoConfig.from_pretrained(tmp_path)
    declared = {field.name for field in fields(theirs)} - {field.name for field in fields(PreTrainedConfig)}
    for name in (declared | config.keys() | theirs.attribute_map.keys()) - TRANSLATED:
        assert first.values[name] == getattr(theirs, name), name
    assert (config.keys() & declared) - SIZES.keys() <= set(first.changed) <= declared
    assert "vocab_size" not in first.changed


def test_another_file_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_fields(write(tmp_path, CONFIGS[0])).values["model_type"] == "llama"
    assert read_fields(write(tmp_path, CONFIGS[2])).values["model_type"] == "mixtral"
    with pytest.raises(ImportError):
        read_without_transformers(write(tmp_path, CONFIGS[0] | {"hidden_size": 32}), monkeypatch)


def test_a_damaged_or_unwritable_cache_is_told_and_costs_only_time(cache: Path, tmp_path: Path, caplog) -> None:
    file = write(tmp_path, CONFIGS[0])
    expected = read_fields(file)
    (kept,) = cache.iterdir()
    kept.write_text(kept.read_text()[:-9])
    assert read_fields(file) == expected
    assert "it is written again" in caplog.text
    json.loads(kept.read_text())

    kept.unlink()
    cache.rmdir()
    cache.write_text("a file where the folder would be")
    assert read_fields(file) == expected
    assert "cannot be written" in caplog.text


def test_what_is_refused_is_not_kept(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="hidden_size"):
        read_fields(write(tmp_path, CONFIGS[0] | {"hidden_size": "wide"}))
    assert not cache.exists()
