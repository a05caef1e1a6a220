"""The checkpoint that is to be served: found, fetched if need be, and fit for the layout that was asked for."""

from __future__ import annotations

from functools import partial

from ..common.config import ServeConfig
from ..models.store import resolve
from ..models.store_progress import terminal_progress
from ..scheduler.expert_balancer import first_slots


def find_served_model(config: ServeConfig) -> str:
    """Its directory.

    Raises:
        ModelNotFound, ModelLoadError, ConfigError: there is none, or the ranks of a replica cannot share it.
    """
    with terminal_progress() as progress:
        path = str(resolve(config.model.model, pull_missing=True, progress=progress).path)
    parallel = config.parallel
    if parallel.num_ranks > 1:
        from ..models.build import check_ranks  # with torch, most of what a command's start would take

        rule = None
        if parallel.rebalance_interval_steps:
            rule = partial(first_slots, num_redundant=parallel.redundant_experts, num_ranks=parallel.num_ranks)
        size, data_size = parallel.tensor_parallel, parallel.data_parallel
        check_ranks(path, size=size, whole_experts=parallel.expert_parallel, data_size=data_size, first_slots=rule)
    return path
