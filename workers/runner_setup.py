"""From a configuration to a runner that can run steps: find the model, load it, measure memory, allocate the KV cache."""

from __future__ import annotations

import logging
import os
import time

import torch

from ..common.config import DEFAULT_KV_MEMORY_FRACTION, EngineConfig, ModelConfig
from ..common.errors import ConfigError
from ..common.rank_place import RankPlace
from ..common.requests import WorkerInfo
from ..kernels.cpu.threads import use_threads
from ..kernels.dispatch import backend_report, kernel_mode
from ..models.build import load_model
from ..models.causal_lm import CausalLM
from ..models.dummy import build_dummy
from ..models.dummy_shapes import is_dummy
from ..models.parallel import Parallel
from ..models.store import resolve
from .chunk_graphs import chunk_sizes
from .comm import RankGroup
from .cpu_threads import usable_cores
from .cuda_graphs import GraphRecorder, uses_graphs
from .decode_graphs import graph_sizes
from .expert_mover import ExpertMover
from .kv_cache import KvCache, KvLayout, allocate_kv_cache
from .largest_step import measure_largest_step
from .memory import available_bytes, num_kv_blocks
from .model_runner import ModelRunner
from .rehearsal import compile_kernels

logger = logging.getLogger(__name__)


def set_up_runner(
    model_config: ModelConfig, engine_config: EngineConfig, *, group: RankGroup | None = None
) -> tuple[ModelRunner, WorkerInfo]:
    """The runner and the facts found on the way. All ranks of a `group` do this together.

    Raises:
        ConfigError: a setting does not fit this model or machine; the message names it.
        ModelNotFound, ModelLoadError: the model cannot be found or loaded, and why.
    """
    start_s = time.perf_counter()
    try:
        kernel_mode()
    except ValueError as error:  # before any op asks
        raise ConfigError(str(error)) from error
    device = choose_device(engine_config, None if group is None else group.place)
    model, path = _load(model_config, device, Parallel() if group is None else group.parallel)
    experts = ExpertMover(model, group) if group is not None and group.place.balances_experts else None
    if device.type == "cpu":
        use_threads(engine_config.num_threads or usable_cores())
    max_model_len = _choose_max_model_len(model_config, model.config.max_position)
    num_tokens = _choose_max_num_batched_tokens(engine_config, device)
    if group is not None:
        group.open_large_sums(num_tokens * model.config.hidden_size * model.dtype.itemsize)
    kv_cache = _allocate_measured(
        model, engine_config, max_num_batched_tokens=num_tokens, max_model_len=max_model_len, group=group
    )
    runner = ModelRunner(
        model,
        config=engine_config,
        kv_cache=kv_cache,
        max_model_len=max_model_len,
        device=device,
        group=group,
        experts=experts,
    )
    if uses_graphs(engine_config, device):
        runner.use_graphs(
            graph_sizes(engine_config.max_num_seqs),
            chunk_sizes(num_tokens, of_data_ranks=model.data is not None),
            recorder=GraphRecorder(),
        )
    if experts is not None:
        experts.forget_loads()
    if group is not None:
        group.end_set_up()
    info = WorkerInfo(
        model_name=model_config.name,
        model_path=path,
        architecture=model.config.architecture,
        device=str(device),
        dtype=str(model.dtype).removeprefix("torch."),
        vocab_size=model.config.vocab_size,
        max_model_len=max_model_len,
        block_size=kv_cache.block_size,
        num_blocks=kv_cache.num_blocks,
        max_num_seqs=engine_config.max_num_seqs,
        max_num_batched_tokens=num_tokens,
        num_parameters=model.num_parameters,
        weight_bytes=model.weight_bytes,
        kv_cache_bytes=kv_cache.num_bytes,
        load_seconds=time.perf_counter() - start_s,
        kernels=backend_report([device.type]),  # of no other: its kernels would be compiled for nothing
        pid=os.getpid(),
        num_ranks=1 if group is None else group.place.num_ranks,
    )
    logger.info(
        "ready in %.1f s: KV cache of %d tokens (%.2f GiB)",
        info.load_seconds,
        kv_cache.num_blocks * kv_cache.block_size,
        kv_cache.num_bytes / 2**30,
    )
    return runner, info


def _load(config: ModelConfig, device: torch.device, parallel: Parallel) -> tuple[CausalLM, str]:
    """The model, and where it lies; a dummy lies nowhere and keeps its name."""
    if is_dummy(config.model):
        return build_dummy(config.model, device=device, dtype=config.dtype, parallel=parallel), config.model
    path = resolve(config.model).path
    return load_model(path, device=device, dtype=config.dtype, parallel=parallel), str(path)


def choose_device(config: EngineConfig, place: RankPlace | None = None) -> torch.device:
    """Of a rank, the GPU of its place. Raises ConfigError where cuda is asked for and there is none."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no CUDA device here: use device auto or cpu, or see `pilotfish env`")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device() if place is None else place.gpu)


def _choose_max_model_len(config: ModelConfig, max_position: int) -> int:
    if config.max_model_len is None:
        return max_position
    if not 2 <= config.max_model_len <= max_position:
        raise ConfigError(f"max_model_len must be in [2, {max_position}] for this model, not {config.max_model_len}")
    return config.max_model_len


def _choose_max_num_batched_tokens(config: EngineConfig, device: torch.device) -> int:
    return config.max_num_batched_tokens or max(2048 if device.type == "cuda" else 512, config.max_num_seqs)


def _allocate_measured(
    model: CausalLM, config: EngineConfig, *, max_num_batched_tokens: int, max_model_len: int, group: RankGroup | None
) -> KvCache:
    """The cache, of the size asked for or of the size that measuring the largest step leaves room for on every rank."""
    layout = KvLayout(
        block_size=config.block_size,
        num_layers=model.config.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.config.head_dim,
        dtype=model.dtype,
        values_in_keys=model.config.latent is not None,
    )
    temporary_bytes = available = 0
    one_page = allocate_kv_cache(layout, num_blocks=0, device=model.device)
    compile_kernels(
        model, config=config, num_tokens=max_num_batched_tokens, one_page=one_page, max_model_len=max_model_len, group=group
    )
    if config.num_kv_blocks is None:
        temporary_bytes = measure_largest_step(
            model, config=config, num_tokens=max_num_batched_tokens, one_page=one_page, max_model_len=max_model_len, group=group
        )
        available = available_bytes(model.device)
        logger.info("the largest step takes %.0f MB; %.2f GiB are left", temporary_bytes / 1e6, available / 2**30)
    num_blocks = num_kv_blocks(
        config=config,
        fraction=config.kv_memory_fraction or DEFAULT_KV_MEMORY_FRACTION[model.device.type],
        max_model_len=max_model_len,
        bytes_per_block=layout.bytes_per_block,
        available=available,
        temporary_bytes=temporary_bytes,
    )
    if group is not None:
        num_blocks = group.agree_on_least(num_blocks)
    return allocate_kv_cache(layout, num_blocks=num_blocks, device=model.device)
