"""Runs work on every rank of a RankGroup, each in a process of its own: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from pilotfish.common.rank_place import RankPlace
from pilotfish.workers.comm import RankGroup, Rendezvous

HOST = "127.0.0.1"


def run_on_ranks(
    size: int, work: Callable[..., Any], *args: Any, device_type: str, timeout_s: float = 120, collective_timeout_s: float = 60
) -> list[Any]:
    """What work(group, device, *args) returned on each rank, in their order. `work` must be importable, for processes are new.

    Raises what a rank raised, or TimeoutError.
    """
    rendezvous = Rendezvous(host=HOST, timeout_s=collective_timeout_s)
    shared = {"size": size, "epoch": 1, "address": rendezvous.address, "host": HOST, "timeout_s": collective_timeout_s}
    pool = ProcessPoolExecutor(size, mp_context=get_context("spawn"))
    try:
        ranks = [pool.submit(_run, RankPlace(rank=rank, **shared), device_type, work, args) for rank in range(size)]
        return [rank.result(timeout_s) for rank in ranks]
    finally:
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(cancel_futures=True)


def _run(place: RankPlace, device_type: str, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    device = torch.device("cuda", place.rank) if device_type == "cuda" else torch.device("cpu")
    group = RankGroup.join(place, device)
    result = work(group, device, *args)
    group.agree_on_least(0)  # the others may need this rank yet
    return result
