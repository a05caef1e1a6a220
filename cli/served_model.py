"""The checkpoint that is to be served: found, fetched if need be, and fit for the layout that was asked for."""

from __future__ import annotations

from ..common.config import ServeConfig
from ..models.build import check_ranks
from ..models.store import resolve
from ..models.store_progress import terminal_progress


def find_served_model(config: ServeConfig) -> str:
    """Its directory.

    Raises:
        ModelNotFound, ModelLoadError: there is none, or the ranks of a replica cannot share it.
    """
    with terminal_progress() as progress:
        path = str(resolve(config.model.model, pull_missing=True, progress=progress).path)
    parallel = config.parallel
    if parallel.num_ranks > 1:
        size, data_size = parallel.tensor_parallel, parallel.data_parallel
        check_ranks(path, size=size, whole_experts=parallel.expert_parallel, data_size=data_size)
    return path
