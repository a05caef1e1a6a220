"""Tables of measured choices: which kernel, and with which sizes, serves an op on a shape of one GPU model.

A table is a JSON file for each GPU model, `tuned/<gpu>.json`, shipped with the package and written by `python -m
pilotfish.kernels.tune`. It is read once, at the first lookup. What is not in it is not guessed here: `lookup` answers None
and the op applies its own rule. Rows are kept in buckets of powers of two. Where the largest of an op and shape is MANY_ROWS or
more, it serves what is beyond it too. float16 has no entries of its own: it moves the bytes of bfloat16 and shares its entries.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

TABLES = Path(__file__).parent / "tuned"
MANY_ROWS = 512  # from here on the rate of the tensor cores decides, and what is best for some is best for more

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One measured choice.

    Attributes:
        op: name of the op, such as "linear".
        dtype: "bfloat16" (float16 too) or "float32".
        sizes: what defines the shape apart from its rows, in the op's own order: (N, K) of a weight, (E, N, K) of experts.
        num_rows: the bucket of rows, a power of two.
        config: what the op's launcher takes; "kernel" names the kernel.
        time_us: of the choice.
        baseline_us: of what served the op before; 0 where there was nothing to compare with.
    """

    op: str
    dtype: str
    sizes: tuple[int, ...]
    num_rows: int
    config: Config
    time_us: float = 0.0
    baseline_us: float = 0.0

    @property
    def key(self) -> tuple[str, str, tuple[int, ...], int]:
        return self.op, self.dtype, self.sizes, self.num_rows


def lookup(op: str, dtype: torch.dtype, sizes: tuple[int, ...], num_rows: int, device: torch.device) -> Config | None:
    """The config of the bucket of `num_rows`, or, beyond the largest bucket, of that, if it is MANY_ROWS or more; else None.

    Host values only, so it may be called while a CUDA graph is captured. `device` has an index.
    """
    return _lookup(op, _dtype_name(dtype), sizes, row_bucket(num_rows), device)


@cache  # it runs at every op
def _lookup(op: str, dtype: str, sizes: tuple[int, ...], num_rows: int, device: torch.device) -> Config | None:
    table, shape = _table(torch.cuda.get_device_name(device)), (op, dtype, sizes)
    most_rows = max((rows for *some_shape, rows in table if tuple(some_shape) == shape), default=0)
    return table.get((*shape, most_rows if num_rows > most_rows >= MANY_ROWS else num_rows))


@cache
def _table(gpu_name: str) -> dict[tuple[str, str, tuple[int, ...], int], Config]:
    """Cached, so that a GPU without one is named once."""
    path = table_path(gpu_name)
    if not path.exists():
        logger.warning(
            "no table says which kernels are fastest on %s (%s): general rules choose them. "
            "`python -m pilotfish.kernels.tune` measures and writes one",
            gpu_name,
            path.name,
        )
    return {entry.key: entry.config for entry in load_entries(path)}


def row_bucket(num_rows: int) -> int:
    """The least power of two that is not below `num_rows`."""
    return 1 << max(num_rows - 1, 0).bit_length()


def table_path(gpu_name: str) -> Path:
    """Where the table of a GPU model lies in the package: "NVIDIA H200" has tuned/nvidia-h200.json."""
    return TABLES / f"{re.sub(r'[^a-z0-9]+', '-', gpu_name.lower()).strip('-')}.json"


def load_entries(path: Path) -> list[Entry]:
    """The entries of a table; none where there is no file. ValueError where the file is not a table."""
    if not path.exists():
        return []
    try:
        entries = [Entry(**{**fields, "sizes": tuple(fields["sizes"])}) for fields in json.loads(path.read_text())["entries"]]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a tuning table ({error!r}): write it anew with python -m pilotfish.kernels.tune"
        ) from error
    return entries


def save_entries(path: Path, entries: Iterable[Entry], *, measured_on: Mapping[str, str]) -> None:
    """Adds entries to the table, in place of those of the same key; one a line, sorted, so that differences can be read.

    `measured_on` says what the times of these entries hold for: GPU and versions.
    """
    merged = {entry.key: entry for entry in [*load_entries(path), *entries]}
    lines = ",\n    ".join(json.dumps(asdict(merged[key])) for key in sorted(merged))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n  "measured_on": {json.dumps(dict(measured_on))},\n  "entries": [\n    {lines}\n  ]\n}}\n')
    _table.cache_clear()
    _lookup.cache_clear()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(torch.bfloat16 if dtype is torch.float16 else dtype).removeprefix("torch.")
