"""Runs one piece of work on every rank of a group of processes on this machine, tensor and data ranks: for proofs and tests.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from .parallel import DataParallel, Parallel

# work(parallel, *args) on each rank; what it returns becomes JSON.
Work = Callable[..., Any]
_GRACE_S = 5
_PRELOADED = ["torch.distributed", f"{__package__}.build"]
_FIRST_ERROR = "first_error"


class RanksFailedError(RuntimeError):
    """A rank raised, died or was not ready in time."""


def run_ranks(
    size: int, work: Work, *args: Any, data_size: int = 1, whole_experts: bool = False, timeout_s: float = 600
) -> list[Any]:
    """What work(parallel, *args) returned on each of `size` ranks of each of `data_size` data ranks, in their order.

    All processes have ended then.

    Args:
        whole_experts: as of Parallel; of several data ranks it must be set.
        work: an importable function, since the processes are new ones. `args` must survive pickle.

    Raises:
        RanksFailedError: one of the ranks failed, with what the first to fail said, or `timeout_s` is over.
    """
    deadline_s, num_ranks = time.monotonic() + timeout_s, size * data_size
    with tempfile.TemporaryDirectory(prefix="pilotfish-ranks-") as name:
        directory, num_threads = Path(name), max(1, torch.get_num_threads() // num_ranks)
        group = _Group(
            size=size,
            data_size=data_size,
            whole_experts=whole_experts,
            directory=directory,
            num_threads=num_threads,
            timeout_s=timeout_s,
        )
        multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
        ranks = mp.start_processes(
            _run_rank,
            args=(group, work, args),
            nprocs=num_ranks,
            join=False,
            daemon=True,
            start_method="forkserver",
        )
        try:
            while not ranks.join(timeout=1, grace_period=_GRACE_S):
                if time.monotonic() > deadline_s:
                    raise RanksFailedError(f"{num_ranks} ranks were not ready in {timeout_s:.0f} s")
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            raise RanksFailedError(_first_error(directory) or str(error)) from error
        finally:
            for process in ranks.processes:
                process.kill()
                process.join(_GRACE_S)
        return [json.loads((directory / str(rank)).read_text(encoding="utf-8")) for rank in range(num_ranks)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    size: int
    data_size: int
    whole_experts: bool
    directory: Path  # of the store and of what the ranks return
    num_threads: int  # of a rank
    timeout_s: float  # of the start and of a collective


def _run_rank(rank: int, group: _Group, work: Work, args: tuple[Any, ...]) -> None:
    size, directory = group.size * group.data_size, group.directory
    torch.set_num_threads(group.num_threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store, timeout = f"file://{directory}/store", timedelta(seconds=group.timeout_s)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timeout)
    try:
        result = work(_gloo_parallel(rank, group), *args)
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


def _gloo_parallel(number: int, group: _Group) -> Parallel:
    size, data_size = group.size, group.data_size
    data_rank, rank = divmod(number, size)
    data, tensor = None, None  # the group of all, where there are no data ranks
    if data_size > 1:  # every process makes all groups, in one order
        numbers = torch.arange(size * data_size).view(data_size, size)
        tensor = [dist.new_group(row) for row in numbers.tolist()][data_rank]
        data = _gloo_data(data_rank, data_size, [dist.new_group(column) for column in numbers.T.tolist()][rank])

    def all_reduce(x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, group=tensor)
        return x

    def all_gather(x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(parts, x, group=tensor)
        return torch.cat(parts, dim=-1)

    return Parallel(
        rank=rank,
        size=size,
        whole_experts=group.whole_experts,
        all_reduce=all_reduce,
        all_gather=all_gather,
        data=data,
    )


def _gloo_data(rank: int, size: int, group: dist.ProcessGroup) -> DataParallel:
    def all_gather_rows(x_NH: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x_NH) for _ in range(size)]
        dist.all_gather(parts, x_NH, group=group)
        return torch.cat(parts)

    def reduce_scatter_rows(x_RH: torch.Tensor) -> torch.Tensor:
        total_RH = x_RH.clone()
        dist.all_reduce(total_RH, group=group)
        return total_RH.chunk(size)[rank]

    def exchange_rows(x_SH: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        out_RH = x_SH.new_empty(sum(received), x_SH.shape[1])
        dist.all_to_all_single(out_RH, x_SH.contiguous(), list(received), list(sent), group=group)
        return out_RH

    return DataParallel(
        rank=rank,
        size=size,
        all_gather_rows=all_gather_rows,
        reduce_scatter_rows=reduce_scatter_rows,
        exchange_rows=exchange_rows,
    )
