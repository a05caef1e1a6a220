"""Counters by which the programs that share a result find out which of them comes last, and so has to finish it.

A program adds one to the counter of its result, with acquire and release semantics, behind the store of its part. Who reads
the number of parts less one is the last: all parts are visible to it, and it sets the counter back to 0, so that every launch
finds zeros. Parts are added in their own order, whoever adds them: results do not depend on who was last.

The counters of a device serve one stream at a time: two launches that use them may not overlap. Kernels with programmatic
dependent launch touch them behind `gdc_wait`.
"""

from functools import cache

import torch

MAX_COUNTERS = 1 << 16


@cache
def arrival_counters(device: torch.device) -> torch.Tensor:
    """int32 zeros [MAX_COUNTERS], the same at every call, so that a CUDA graph may hold them. The first call comes before."""
    return torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)
