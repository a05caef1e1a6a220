"""Runs one piece of work on every rank of a tensor-parallel group of processes on this machine: for proofs and tests.

run_ranks(): start a process a rank, join them by gloo over the loopback, work, end. Serving has its own groups (workers).

The processes are forks of Python's fork server, which has imported torch, seconds for each of them, once. It starts at the
first call, keeps the environment variables of that moment, and ends with this process.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from .parallel import Parallel

# work(parallel, *args) on each rank; what it returns becomes JSON.
Work = Callable[..., Any]
_GRACE_S = 5
_PRELOADED = ["torch.distributed", f"{__package__}.build"]
_FIRST_ERROR = "first_error"


class RanksFailedError(RuntimeError):
    """A rank raised, died or was not ready in time."""


def run_ranks(size: int, work: Work, *args: Any, timeout_s: float = 600) -> list[Any]:
    """What work(parallel, *args) returned on each of `size` ranks, in rank order. All processes have ended then.

    Args:
        work: an importable function, since the processes are new ones. `args` must survive pickle.

    Raises:
        RanksFailedError: one of the ranks failed, with what the first to fail said, or `timeout_s` is over.
    """
    deadline_s = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory(prefix="pilotfish-ranks-") as name:
        directory, num_threads = Path(name), max(1, torch.get_num_threads() // size)
        group = _Group(size=size, directory=directory, num_threads=num_threads, timeout_s=timeout_s)
        multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
        ranks = mp.start_processes(
            _run_rank,
            args=(group, work, args),
            nprocs=size,
            join=False,
            daemon=True,
            start_method="forkserver",
        )
        try:
            while not ranks.join(timeout=1, grace_period=_GRACE_S):
                if time.monotonic() > deadline_s:
                    raise RanksFailedError(f"{size} ranks were not ready in {timeout_s:.0f} s")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            raise RanksFailedError(_first_error(directory) or str(error)) from error
        finally:
            for process in ranks.processes:
                process.kill()
                process.join(_GRACE_S)
        return [json.loads((directory / str(rank)).read_text(encoding="utf-8")) for rank in range(size)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    size: int
    directory: Path  # of the store and of what the ranks return
    num_threads: int  # of a rank
    timeout_s: float  # of the start and of a collective


def _run_rank(rank: int, group: _Group, work: Work, args: tuple[Any, ...]) -> None:
    size, directory = group.size, group.directory
    torch.set_num_threads(group.num_threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store, timeout = f"file://{directory}/store", timedelta(seconds=group.timeout_s)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
    try:
        result = work(_gloo_parallel(rank, size), *args)
        dist.barrier()  # the others' last collective may need this rank yet
    except Exception as error:
        # Its peers' broken connections are errors too, but not the cause.
        with contextlib.suppress(FileExistsError), (directory / _FIRST_ERROR).open("x", encoding="utf-8") as file:
            file.write(f"rank {rank} of {size}: {type(error).__name__}: {error}")
        raise
    finally:
        dist.destroy_process_group()
    (directory / str(rank)).write_text(json.dumps(result), encoding="utf-8")


def _first_error(directory: Path) -> str | None:
    file = directory / _FIRST_ERROR
    return file.read_text(encoding="utf-8") if file.exists() else None


def _gloo_parallel(rank: int, size: int) -> Parallel:
    def all_reduce(x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        return x

    def all_gather(x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(parts, x)
        return torch.cat(parts, dim=-1)

    return Parallel(rank=rank, size=size, all_reduce=all_reduce, all_gather=all_gather)
