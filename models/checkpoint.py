"""The safetensors files of one model directory, opened and indexed: headers first, then slices on request.

Files are mapped into memory while open; a read tensor is a view of the mapping, so copy what must outlive `close`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..common.errors import ModelLoadError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Header of one tensor; `dtype` is safetensors' name for it, such as BF16."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """Use as a context manager.

    Attributes:
        tensors: every tensor of every file, in the order in which they lie on disk.

    Raises:
        ModelLoadError: a file is missing, truncated or corrupt, or contradicts the index.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, StoredTensor] = {}
        self._slices: dict[str, Any] = {}
        self._open_files = ExitStack()
        listed = _list_files(path)
        try:
            for file, expected in listed.items():
                self._open(file, expected)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._slices.clear()
        self._open_files.close()

    def read(self, name: str, region: tuple[slice, ...]) -> torch.Tensor:
        """The tensor's region, as stored: a view of the mapping, whose bytes the disk is asked for when it is copied."""
        stored = self.tensors[name]
        try:
            return self._slices[name][region]
        except SafetensorError as error:
            raise ModelLoadError(f"{self.path / stored.file}: cannot read {name}: {error}; download it again") from error

    def _open(self, file: str, expected: set[str] | None) -> None:
        path = self.path / file
        try:
            handle = self._open_files.enter_context(safe_open(path, framework="pt", device="cpu"))
        except FileNotFoundError as error:
            raise ModelLoadError(f"{path} is missing, though {INDEX_FILE} names it: download the model again") from error
        except (OSError, SafetensorError) as error:
            raise ModelLoadError(f"{path} is truncated or corrupt ({error}): download it again") from error
        for name in handle.offset_keys():
            if name in self.tensors:
                raise ModelLoadError(f"{path} repeats the tensor {name} of {self.tensors[name].file}: remove one of the files")
            self._slices[name] = handle.get_slice(name)
            self.tensors[name] = StoredTensor(file, self._slices[name].get_dtype(), tuple(self._slices[name].get_shape()))
        absent = sorted(name for name in expected or () if name not in self.tensors)
        if absent:
            raise ModelLoadError(f"{path} lacks {_some(absent)}, which {INDEX_FILE} places there: download the model again")


def _list_files(path: Path) -> Mapping[str, set[str] | None]:
    """The weight files, each with the tensors that the index expects in it (None without an index)."""
    if (path / SINGLE_FILE).exists():
        return {SINGLE_FILE: None}
    index = path / INDEX_FILE
    if index.exists():
        return _read_index(index)
    others = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".pth", ".pt"))
    found = f"found only {_some(others)}: convert it with transformers' save_pretrained" if others else "found no weights"
    raise ModelLoadError(f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}; {found}")


def _read_index(index: Path) -> Mapping[str, set[str] | None]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, set[str] | None] = {file: set() for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            expected = files[file]
            assert expected is not None
            expected.add(name)
        outside = [file for file in files if Path(file).name != file]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index} is not a valid index of weights ({error!r}): download it again") from error
    if outside:
        raise ModelLoadError(f"{index} names {_some(outside)} outside the model's directory")
    return files


def _some(names: list[str], limit: int = 4) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def stored_matrix_dtypes(tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    """The dtypes of all tensors that are not vectors."""
    return (tensor.dtype for tensor in tensors.values() if len(tensor.shape) > 1)
