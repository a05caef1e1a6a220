"""What `bench latency` and `bench throughput` share: an engine that fits the workload, beside what the machine allows."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..common.config import EngineConfig, ModelConfig, ParallelConfig, parse
from ..common.requests import WorkerInfo
from ..models.config_reader import ConfigReader
from ..models.dummy_shapes import DUMMY_PREFIX, dummy_shape, is_dummy
from ..models.model_shape import ModelShape
from ..models.registry import lookup
from ..models.shape_reader import read_shape
from . import config_flags
from .bench import BENCH_DEFAULTS, PARALLEL_DEFAULTS
from .bench_engine import BenchEngine, seconds_since_process_start
from .bench_machine import measure_machine
from .bench_roofline import Roofline
from .bench_rows import Rows


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchSession:
    """An engine that has produced its first token.

    Attributes:
        facts: columns that every row begins with.
        start_s: from the process's start to the first token.
    """

    engine: BenchEngine
    roofline: Roofline
    facts: dict[str, Any]
    start_s: float


@contextmanager
def bench_session(args: argparse.Namespace, rows: Rows, *, max_num_seqs: int) -> Iterator[BenchSession]:
    """Starts an engine for sequences of args.input_len + args.output_len tokens, `max_num_seqs` of them at a time."""
    name = DUMMY_PREFIX + args.shape if args.shape is not None else args.model
    model_config = ModelConfig(model=name, dtype=args.dtype, max_model_len=args.input_len + args.output_len)
    parallel = parse(ParallelConfig, {**PARALLEL_DEFAULTS, **config_flags.section_values(args, "parallel")})
    engine_config = _engine_config(args, max_num_seqs, parallel.tensor_parallel)
    num_ranks = parallel.num_ranks
    rows.say(f"Starting {name}" + (f" on {num_ranks} ranks" if num_ranks > 1 else ""))
    with BenchEngine(model_config, engine_config, parallel, seed=args.seed) as engine:
        engine.run(1, input_len=args.input_len, output_len=1)
        start_s, info = seconds_since_process_start(), engine.info
        where = info.device if num_ranks == 1 else f"each of {num_ranks} ranks"
        rows.say(
            f"First token {start_s:.1f} s after the process began: {info.num_parameters / 1e6:.1f} M parameters on {where}, "
            f"KV cache of {info.num_blocks * info.block_size} tokens"
        )
        roofline = _measure_roofline(info, parallel)
        facts = {
            "model": name,
            "device": _device_name(info.device),
            "dtype": info.dtype,
            "tensor_parallel": parallel.tensor_parallel,
            "data_parallel": parallel.data_parallel,
            "expert_parallel": parallel.expert_parallel,
            "input_len": args.input_len,
            "output_len": args.output_len,
            "read_tb_s": roofline.machine.read_bytes_per_s / 1e12,
            "tflop_s": roofline.machine.flop_per_s / 1e12,
            "start_s": start_s,
        }
        yield BenchSession(engine=engine, roofline=roofline, facts=facts, start_s=start_s)


def _engine_config(args: argparse.Namespace, max_num_seqs: int, num_tensor_ranks: int) -> EngineConfig:
    given = config_flags.section_values(args, "engine")
    values = {"max_num_seqs": max_num_seqs, **BENCH_DEFAULTS, **given}
    config = parse(EngineConfig, values)
    if config.max_num_batched_tokens is None and config.device != "cpu" and torch.cuda.is_available():
        return replace(config, max_num_batched_tokens=max(8192 * num_tensor_ranks, config.max_num_seqs))
    return config


def _measure_roofline(info: WorkerInfo, parallel: ParallelConfig) -> Roofline:
    dtype = getattr(torch, info.dtype)
    return Roofline(
        shape=_read_shape(info),
        machine=measure_machine(torch.device(info.device), dtype=dtype),
        weight_bytes=info.weight_bytes / info.num_parameters,
        kv_bytes=dtype.itemsize,
        num_ranks=parallel.tensor_parallel,
        num_data_ranks=parallel.data_parallel,
    )


def _read_shape(info: WorkerInfo) -> ModelShape:
    if is_dummy(info.model_path):
        return dummy_shape(info.model_path)
    return read_shape(ConfigReader(Path(info.model_path)), lookup(info.architecture), architecture=info.architecture)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device
