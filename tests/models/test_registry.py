"""Architectures by name, and that family files stay small."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
from pilotfish.common.errors import ModelLoadError
from pilotfish.models.build import load_model
from pilotfish.models.registry import ARCHITECTURES, lookup


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_known_architectures_have_a_spec_in_a_small_file(architecture: str) -> None:
    assert lookup(architecture).model_type.replace("_", "") in architecture.lower()
    module = importlib.import_module(f"pilotfish.models.families.{ARCHITECTURES[architecture].split(':')[0]}")
    assert len(inspect.getsource(module).splitlines()) <= 60


def test_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(ModelLoadError, match=r"'Qwen3MoEForCausalLM' is not supported.*Qwen3MoeForCausalLM"):
        lookup("Qwen3MoEForCausalLM")
    with pytest.raises(ModelLoadError, match=r"'Whisper' is not supported \(known: .*LlamaForCausalLM, "):
        lookup("Whisper")


@pytest.mark.parametrize(
    "text", ["{}", '{"architectures": []}', '{"architectures": "x"}', '{"architectures": ["a", "b"]}', "[]"]
)
def test_config_without_one_architecture(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelLoadError, match="must name one architecture"):
        load_model(tmp_path, device="cpu")


def test_config_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"needs its config\.json"):
        load_model(tmp_path / "nowhere", device="cpu")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="not valid JSON"):
        load_model(tmp_path, device="cpu")


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}})
    )
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelLoadError, match=r"transformers .* refuses it"):
        load_model(tmp_path, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_the_page_on_adding_a_model_shows_the_real_file() -> None:
    root = Path(inspect.getfile(lookup)).parents[1]
    source = (root / "models/families/qwen3.py").read_text()
    page = (root / "docs/adding-a-model.md").read_text()
    assert f"```python\n{source}```" in page
    assert all((root / name).exists() for name in re.findall(r"`((?:models|tests)/[\w/]+\.py)`", page))
