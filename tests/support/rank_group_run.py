"""Runs work on every rank of a RankGroup, each in a process of its own: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from pilotfish.common.rank_place import RankPlace
from pilotfish.workers.comm import RankGroup, Rendezvous
from processes import preloaded_processes

HOST = "127.0.0.1"


def run_on_ranks(
    size: int,
    work: Callable[..., Any],
    *args: Any,
    device_type: str,
    data_size: int = 1,
    timeout_s: float = 120,
    collective_timeout_s: float = 60,
) -> list[Any]:
    """What work(group, device, *args) returned on each of `size` ranks of each of `data_size` data ranks, in their order.

    `work` must be importable, for processes are new.

    Raises what a rank raised, or TimeoutError.
    """
    rendezvous = Rendezvous(host=HOST, timeout_s=collective_timeout_s)
    places = [
        RankPlace(
            rank=number % size,
            size=size,
            data_rank=number // size,
            data_size=data_size,
            epoch=1,
            address=rendezvous.address,
            host=HOST,
            timeout_s=collective_timeout_s,
            whole_experts=data_size > 1,
        )
        for number in range(size * data_size)
    ]
    pool = ProcessPoolExecutor(len(places), mp_context=preloaded_processes())
    try:
        ranks = [pool.submit(_run, place, device_type, work, args) for place in places]
        return [rank.result(timeout_s) for rank in ranks]
    finally:
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(cancel_futures=True)


def _run(place: RankPlace, device_type: str, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    device = torch.device("cuda", place.number) if device_type == "cuda" else torch.device("cpu")
    group = RankGroup.join(place, device)
    result = work(group, device, *args)
    group.agree_on_least(0)  # the others may need this rank yet
    return result
