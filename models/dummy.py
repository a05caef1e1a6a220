"""Models of a real shape with random weights, made on the device in seconds: what benchmarks run where there are no files.

The name `dummy:<shape>` (dummy_shapes.py) stands where a model's path would. A dummy has no tokenizer: it runs on token ids.

Weights are normal with standard deviation 1 / sqrt(inputs), so that activations keep their size through the layers (where a
checkpoint has inputs x outputs, as gpt-oss's experts, of the outputs, which are of that order); norms and sinks are one. An
embedding that is not the head too has standard deviation 1, like what the layers add to it: different tokens then stay
different in every layer and, each router being drawn on its own, spread over the experts.

Each tensor is drawn whole, from the seed and its name, whatever part of it a rank keeps: over ranks it is the same model.
"""

from __future__ import annotations

import logging
import time
import zlib

import torch

from .build import DtypeName, choose_dtypes
from .causal_lm import CausalLM
from .dummy_shapes import dummy_shape
from .layers.embedding import EMBEDDING_NAME
from .parallel import Parallel
from .registry import lookup
from .weight_source import Placement

logger = logging.getLogger(__name__)


def build_dummy(
    model: str,
    *,
    device: str | torch.device,
    dtype: DtypeName = "auto",
    parallel: Parallel | None = None,
    seed: int = 0,
) -> CausalLM:
    """A model like a bfloat16 checkpoint of this shape, with weights drawn from `seed` on `device`.

    Raises:
        ModelNotFound: no shape has this name.
        ConfigError: `dtype` is not computed on `device`.
    """
    shape, device, start_s = dummy_shape(model), torch.device(device), time.perf_counter()
    weight_dtype, compute_dtype = choose_dtypes(device, dtype, {"BF16"})
    placement = Placement(
        device=device, weight_dtype=weight_dtype, compute_dtype=compute_dtype, parallel=parallel or Parallel()
    )
    built = CausalLM(shape, lookup(shape.architecture), checkpoint_names=frozenset(), placement=placement).eval()
    _fill(built, seed)
    logger.info("made %s: %.1f M random parameters in %.1f s", model, built.num_parameters / 1e6, time.perf_counter() - start_s)
    return built


@torch.no_grad()
def _fill(model: CausalLM, seed: int) -> None:
    generator = torch.Generator(model.device)
    for source in model.weight_sources():
        if len(source.shape) == 1:
            source.target.fill_(0 if source.name.endswith("bias") else 1)
            continue
        generator.manual_seed(zlib.crc32(f"{seed} {source.name}".encode()))  # a CPU looks at 32 bits
        std = 1.0 if source.name == EMBEDDING_NAME and not model.embedding.is_tied else source.shape[-1] ** -0.5
        whole = torch.empty(source.shape, dtype=source.target.dtype, device=model.device)
        source.target.copy_(whole.normal_(std=std, generator=generator)[source.region])
