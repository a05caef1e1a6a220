"""Loads a model: config to shape, shape to empty layers, checkpoint into them."""

from __future__ import annotations

import logging
import time
from itertools import product
from pathlib import Path
from typing import Literal

import torch

from ..common.errors import ConfigError
from .causal_lm import CausalLM
from .checkpoint import Checkpoint, stored_matrix_dtypes
from .config_reader import ConfigReader, read_architecture
from .family_spec import FamilySpec
from .loader import Progress, load_weights
from .model_shape import ModelShape
from .parallel import DataParallel, FirstSlots, Parallel
from .registry import lookup
from .shape_reader import read_shape
from .weight_source import Placement

logger = logging.getLogger(__name__)

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def load_model(
    path: str | Path,
    *,
    device: str | torch.device,
    dtype: DtypeName = "auto",
    parallel: Parallel | None = None,
    progress: Progress | None = None,
) -> CausalLM:
    """The model of a Hugging Face checkpoint directory, ready for inference on `device`.

    Args:
        dtype: of the computation. "auto" is float32 on a CPU, where bfloat16 weights stay as they are stored, and on a GPU
            the checkpoint's own.
        progress: called with (bytes read, bytes to read) after each tensor.

    Raises:
        ModelLoadError: the checkpoint cannot be loaded as it is; the message names what is wrong with it.
        ConfigError: `dtype` is not computed on `device`.
    """
    path, device = Path(path), torch.device(device)
    parallel = parallel or Parallel()
    start_s = time.perf_counter()
    shape, spec = _read_shape(path)
    with Checkpoint(path) as checkpoint:
        stored = set(stored_matrix_dtypes(checkpoint.tensors))
        weight_dtype, compute_dtype = choose_dtypes(device, dtype, stored)
        placement = Placement(device=device, weight_dtype=weight_dtype, compute_dtype=compute_dtype, parallel=parallel)
        model = CausalLM(shape, spec, checkpoint_names=checkpoint.tensors.keys(), placement=placement).eval()
        report = load_weights(checkpoint, model.weight_sources(), ignored_prefixes=model.ignored_prefixes, progress=progress)
    logger.info(
        "loaded %s: %.1f M parameters, %.1f MB read (%.1f MB with the rows they lie in) in %.1f s",
        model.config.architecture,
        model.num_parameters / 1e6,
        report.num_bytes / 1e6,
        report.num_disk_bytes / 1e6,
        time.perf_counter() - start_s,
    )
    return model


def check_ranks(
    path: str | Path, *, size: int, whole_experts: bool, data_size: int = 1, first_slots: FirstSlots | None = None
) -> None:
    """Whether `size` tensor ranks on each of `data_size` data ranks can share a checkpoint's model; no weights are read.

    `first_slots` as in Parallel.

    Raises:
        ConfigError: of `first_slots`.
        ModelLoadError: they cannot, or the checkpoint has no model that is known here; the message says what would fit.
    """
    shape, spec = _read_shape(Path(path))
    with Checkpoint(Path(path)) as checkpoint:
        for data_rank, rank in product(range(data_size), range(size)):
            data = None
            if data_size > 1:
                data = DataParallel(
                    rank=data_rank,
                    size=data_size,
                    all_gather_rows=_no_collective,
                    reduce_scatter_rows=_no_collective,
                    exchange_rows=_no_collective,
                )
            parallel = Parallel(
                rank=rank,
                size=size,
                whole_experts=whole_experts,
                first_slots=first_slots,
                all_reduce=_no_collective,
                all_gather=_no_collective,
                data=data,
            )
            placement = Placement(
                device=torch.device("meta"), weight_dtype=torch.bfloat16, compute_dtype=torch.bfloat16, parallel=parallel
            )
            CausalLM(shape, spec, checkpoint_names=checkpoint.tensors.keys(), placement=placement)


def _read_shape(path: Path) -> tuple[ModelShape, FamilySpec]:
    architecture = read_architecture(path)
    spec = lookup(architecture)
    return read_shape(ConfigReader(path), spec, architecture=architecture), spec


def _no_collective(*_: object) -> torch.Tensor:
    raise AssertionError("an empty model computes nothing")


def choose_dtypes(device: torch.device, dtype: DtypeName, stored: set[str]) -> tuple[torch.dtype, torch.dtype]:
    """(of matrices, of the computation) for a checkpoint whose matrices are `stored` so, in names of safetensors.

    Raises:
        ConfigError: `dtype` is not computed on `device`.
    """
    if device.type == "cpu":
        if dtype not in ("auto", "float32"):
            raise ConfigError(f"dtype {dtype} is not computed on a CPU: use auto or float32 (bfloat16 weights stay bfloat16)")
        return (torch.bfloat16 if stored == {"BF16"} else torch.float32), torch.float32
    if dtype != "auto":
        chosen = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    elif stored == {"F16"}:
        chosen = torch.float16
    else:
        chosen = torch.float32 if stored == {"F32"} else torch.bfloat16
    return chosen, chosen
