"""Has the kernels of a model compiled before its first step: all the steps that a start runs are rehearsed.

They go through the real runner, over a cache of a single page, and nothing is launched (kernels/compile_ahead.py): the largest
step, a step of every size that a CUDA graph is recorded of, and larger ones by powers of two, by which tuned tables choose
kernels (kernels/tuning.py). One layer of each kind is enough, since layers that are alike launch the same kernels.

It takes some two seconds where there is nothing to compile, so a start that was rehearsed leaves a stamp beside the compiled
kernels, and one that is like it in all that decides about kernels does without. Where kernels have been removed since, they are
compiled as they are launched.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from pathlib import Path

import torch
import triton
from triton import knobs

from ..common.config import EngineConfig
from ..kernels.compile_ahead import compile_all, noted_kernels
from ..kernels.cpu.library import cache_dir
from ..kernels.dispatch import kernel_mode
from ..models.causal_lm import CausalLM
from ..models.layers.decoder import DecoderLayer
from .chunk_graphs import chunk_sizes
from .comm import RankGroup
from .cpu_threads import usable_cores
from .cuda_graphs import uses_graphs
from .decode_graphs import graph_sizes
from .kv_cache import KvCache
from .largest_step import largest_plan
from .model_runner import ModelRunner

logger = logging.getLogger(__name__)
KERNELS = Path(__file__).parents[1] / "kernels"


def compile_kernels(
    model: CausalLM,
    *,
    config: EngineConfig,
    num_tokens: int,
    one_page: KvCache,
    max_model_len: int,
    group: RankGroup | None = None,
) -> None:
    """Of steps of up to `num_tokens` tokens, on a GPU. All ranks of a `group` rehearse together.

    Where a rank alone cannot rehearse it says why, and kernels are compiled as they are launched.
    """
    if model.device.type != "cuda" or kernel_mode() == "ref":
        return
    stamp = stamp_path(model, config, num_tokens, max_model_len, torch.cuda.get_device_name(model.device))
    is_known = stamp.exists() and Path(knobs.cache.dir).is_dir()
    if is_known if group is None else group.agree_on_least(int(is_known)):
        return
    cache = KvCache(one_page.layers, config.num_kv_blocks or -(-max_model_len // config.block_size), config.block_size)
    max_len = min(max_model_len, cache.num_blocks * cache.block_size)
    plan = largest_plan(model, config=config, num_tokens=num_tokens, max_model_len=max_len)
    with noted_kernels() as kernels:
        runner = ModelRunner(
            _with_each_kind_of_layer(model),
            config=config,
            kv_cache=cache,
            max_model_len=max_model_len,
            device=model.device,
            group=group,
        )
        try:
            runner.launch(plan, isolate_failures=False).result()
            if uses_graphs(config, model.device):
                runner.rehearse(graph_sizes(config.max_num_seqs), _chunk_sizes(model, num_tokens))
        except Exception:
            if group is not None:  # the others are in the middle of it
                raise
            logger.warning("steps cannot be rehearsed: kernels are compiled as they are launched", exc_info=True)
    if compile_all(kernels, device=model.device, num_threads=usable_cores()):
        _leave(stamp)
    if group is not None:
        group.agree_on_least(0)  # one may have compiled for long: kernels between ranks wait no longer than ever for each other


def _leave(stamp: Path) -> None:
    try:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()
    except OSError as error:
        logger.info("the next start will rehearse its steps again: %s", error)


def stamp_path(model: CausalLM, config: EngineConfig, num_tokens: int, max_model_len: int, gpu_name: str) -> Path:
    """Where a rehearsed start leaves its stamp: the name says what the choice and the code of kernels follow from."""
    digest = hashlib.sha256()
    for path in sorted(path for path in KERNELS.rglob("*") if path.suffix in (".py", ".cu", ".cuh", ".json")):
        digest.update(path.read_bytes())
    kinds = [_kind(layer) for layer in _with_each_kind_of_layer(model).decoder_layers]
    facts = (torch.__version__, triton.__version__, gpu_name, kernel_mode(), model.config, config, num_tokens, max_model_len)
    digest.update(repr((facts, model.dtype, kinds)).encode())
    return cache_dir() / f"rehearsed-{digest.hexdigest()[:24]}"


def _chunk_sizes(model: CausalLM, num_tokens: int) -> list[int]:
    sizes = set(chunk_sizes(num_tokens, of_data_ranks=model.data is not None))
    if model.data is None:
        sizes |= {1 << exponent for exponent in range(num_tokens.bit_length()) if 1 << exponent >= min(sizes)}
    return sorted(sizes)


def _with_each_kind_of_layer(model: CausalLM) -> CausalLM:
    """The same model without layers that are like others; the first two stay, for the first has no residual."""
    layers, kinds = model.decoder_layers[:2], {_kind(layer) for layer in model.decoder_layers[:2]}
    for layer in model.decoder_layers[2:]:
        if _kind(layer) not in kinds:
            kinds.add(_kind(layer))
            layers.append(layer)
    few = copy.copy(model)
    few.decoder_layers = layers
    return few


def _kind(layer: DecoderLayer) -> tuple[object, ...]:
    """What decides which kernels it launches."""
    tensors = tuple((name, tensor.shape, tensor.dtype) for name, tensor in layer.named_parameters())
    return getattr(layer.attention, "window", None), tensors
