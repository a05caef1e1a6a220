"""Fills a model's parameters from a checkpoint, strictly: every tensor has one place and every place has its tensor.

Layers say what they want (`WeightSource`); names are matched whole, by dictionary. Problems are found from the headers before a
byte of weights is read. Each tensor is copied once, from the mapped file into its parameter.

A rank copies its own slices only. From the disk it reads them and what the system reads ahead: the rows of a column-parallel
layer are one run of bytes, but the columns of a row-parallel one (attention output, MLP down) are a piece of every row, and the
whole rows come. Measured with half the columns of 100 MB of bfloat16, 12288 columns, on an SSD behind a cold page cache: a copy
from the mapping reads 101 MB in 72 ms, each piece alone 67 MB in 416 ms (pread) or 779 ms (a mapping advised MADV_RANDOM). So
the mapping stays, and LoadReport counts both. Ranks of one machine share its page cache: the disk is read once for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..common.errors import ModelLoadError
from .checkpoint import Checkpoint
from .weight_source import WeightSource

# (bytes read, bytes to read) after each tensor.
Progress = Callable[[int, int], None]

_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
# Old Llama checkpoints carry this derived table in each layer.
_DERIVED = ".rotary_emb.inv_freq"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What was read for this rank.

    Attributes:
        num_bytes: copied into parameters, as stored.
        num_disk_bytes: that, and the rest of the rows of which only some columns were wanted.
    """

    num_tensors: int
    num_bytes: int
    num_disk_bytes: int


def load_weights(
    checkpoint: Checkpoint,
    sources: Iterable[WeightSource],
    *,
    ignored_prefixes: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> LoadReport:
    """Reads every source's region into its target. Tensors below `ignored_prefixes` (which end with a dot) need no place.

    Raises:
        ModelLoadError: a tensor is missing, unused, of another shape, of a dtype that is not supported, or unreadable.
    """
    by_name: dict[str, list[WeightSource]] = {}
    for source in sources:
        by_name.setdefault(source.name, []).append(source)
    _check(checkpoint, by_name, ignored_prefixes)
    sizes = {name: sum(_num_bytes(checkpoint, source) for source in by_name[name]) for name in by_name}
    num_bytes, total = 0, sum(sizes.values())
    num_disk_bytes = sum(_num_bytes(checkpoint, source, whole_rows=True) for group in by_name.values() for source in group)
    in_disk_order = [name for name in checkpoint.tensors if name in by_name]
    # What must repeat another tensor is compared after that one is read.
    in_disk_order.sort(key=lambda name: by_name[name][0].must_equal)
    for name in in_disk_order:
        for source in by_name[name]:
            _fill(checkpoint, source)
        num_bytes += sizes[name]
        if progress is not None:
            progress(num_bytes, total)
    return LoadReport(num_tensors=len(in_disk_order), num_bytes=num_bytes, num_disk_bytes=num_disk_bytes)


def _check(checkpoint: Checkpoint, by_name: dict[str, list[WeightSource]], ignored_prefixes: tuple[str, ...]) -> None:
    tensors = checkpoint.tensors
    missing = [name for name in by_name if name not in tensors]
    unused = [
        name
        for name in tensors
        if name not in by_name and not name.endswith(_DERIVED) and not name.startswith(ignored_prefixes)
    ]
    problems = [f"tensor {name} is missing" for name in missing] + [
        f"tensor {name} ({tensors[name].file}) has no place in the model" for name in unused
    ]
    for name, sources in by_name.items():
        stored = tensors.get(name)
        if stored is None:
            continue
        if stored.shape != sources[0].shape:
            problems.append(f"tensor {name} ({stored.file}) has shape {stored.shape}, the model needs {sources[0].shape}")
        elif stored.dtype not in _ITEM_BYTES:
            problems.append(f"tensor {name} ({stored.file}) is stored as {stored.dtype}; supported: {', '.join(_ITEM_BYTES)}")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more problems" if len(problems) > 5 else "")
        raise ModelLoadError(
            f"{checkpoint.path}: {shown}. config.json and the weights must be of one model: download both again"
        )


def _fill(checkpoint: Checkpoint, source: WeightSource) -> None:
    values = checkpoint.read(source.name, source.region)
    if not source.must_equal:
        source.target.copy_(values)
    elif not torch.equal(source.target, values.to(source.target)):
        raise ModelLoadError(
            f"{checkpoint.path}: config.json ties the embeddings, but {source.name} differs from them: "
            'set "tie_word_embeddings": false to use it, or remove the tensor'
        )


def _num_bytes(checkpoint: Checkpoint, source: WeightSource, *, whole_rows: bool = False) -> int:
    sizes = [len(range(*part.indices(size))) for size, part in zip(source.shape, source.region, strict=True)]
    if whole_rows and len(sizes) > 1:
        sizes[-1] = source.shape[-1]
    return math.prod(sizes) * _ITEM_BYTES[checkpoint.tensors[source.name].dtype]
