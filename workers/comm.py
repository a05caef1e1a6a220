"""The ranks of one replica as a process group: the only file that knows torch.distributed.

Life cycle: the leader opens a Rendezvous on a free port; every rank joins it with `RankGroup.join`, in any order. All ranks
call the same collectives in the same order. Each ends within the timeout: with its result, or with an exception, after which
the group is of no use and its processes end. A message of another epoch is never seen: it is part of every key of the store.

gloo serves CPUs, NCCL GPUs. NVLink multicast stays off (NCCL_NVLS_ENABLE=0 in the worker's environment, see ray_launcher.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from ..common.errors import InternalError
from ..common.rank_place import LEADER, RankPlace
from ..models.parallel import Parallel
from ..scheduler.expert_balancer import first_slots


class Rendezvous:
    """The store through which ranks find each other, in the leader's process; it lives as long as this object."""

    def __init__(self, *, host: str, timeout_s: float) -> None:
        timeout = timedelta(seconds=timeout_s)
        self._store = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        self.address = f"{host}:{self._store.port}"


class RankStore:
    """Words that ranks leave for each other, through a connection of its own. The methods raise RuntimeError where it broke."""

    def __init__(self, place: RankPlace) -> None:
        host, _, port = place.address.rpartition(":")
        timeout = timedelta(seconds=place.timeout_s)
        store = dist.TCPStore(host, int(port), is_master=False, timeout=timeout)
        self.store = dist.PrefixStore(f"epoch-{place.epoch}", store)
        self._timeout = timeout

    def tell(self, key: str, value: str) -> None:
        self.store.set(key, value)

    def hear(self, key: str) -> str:
        """Waits for the word, up to the place's timeout."""
        self.store.wait([key], self._timeout)
        return str(self.store.get(key).decode())

    def told(self, key: str) -> str | None:
        """The word, None if there is none yet."""
        return str(self.store.get(key).decode()) if self.store.check([key]) else None


class RankGroup:
    """The collectives of one replica, as one rank sees them."""

    def __init__(self, place: RankPlace, store: RankStore, group: dist.ProcessGroup, device: torch.device) -> None:
        self.place = place
        self._store = store
        self._group = group
        self._device = device

    @classmethod
    def join(cls, place: RankPlace, device: torch.device) -> RankGroup:
        """Waits for all ranks.

        Raises:
            InternalError: they have not all come within the timeout.
        """
        try:
            store = RankStore(place)
            make = _nccl_group if device.type == "cuda" else _gloo_group
            group = make(place, dist.PrefixStore("group", store.store), device)
            joined = cls(place, store, group, device)
            joined.agree_on_least(place.rank)  # the first collective connects them
        except (RuntimeError, ValueError) as error:
            raise InternalError(
                f"rank {place.rank} of {place.size} found no group of all ranks at {place.address} within "
                f"{place.timeout_s:g} s: {' '.join(str(error).split())[:300]}"
            ) from error
        return joined

    @property
    def parallel(self) -> Parallel:
        place, rule = self.place, None
        if place.balances_experts:
            rule = partial(first_slots, num_redundant=place.num_redundant_experts, num_ranks=place.size)
        return Parallel(
            rank=place.rank,
            size=place.size,
            whole_experts=place.whole_experts,
            first_slots=rule,
            all_reduce=self.all_reduce,
            all_gather=self.all_gather,
        )

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """x becomes the sum over the ranks."""
        x = x.contiguous()
        self._group.allreduce([x], dist.AllreduceOptions()).wait()
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's x of one shape, joined along the last dimension in the order of ranks."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.place.size)]
        self._group.allgather([parts], [x]).wait()
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: torch.Tensor) -> None:
        """x becomes the leader's."""
        options = dist.BroadcastOptions()
        options.rootRank = LEADER
        self._group.broadcast([x], options).wait()

    def exchange_rows(
        self, incoming: torch.Tensor, outgoing: torch.Tensor, *, received: Sequence[int], sent: Sequence[int]
    ) -> None:
        """`sent` [ranks] rows of `outgoing` go to each rank, in order, and `received` of each come into `incoming`.

        Both are contiguous, of one dtype, and have just these rows.
        """
        self._group.alltoall_base(incoming, outgoing, list(received), list(sent), dist.AllToAllOptions()).wait()

    def agree_on_least(self, value: int) -> int:
        """The least of all ranks' values."""
        tensor = torch.tensor([value], dtype=torch.int64, device=self._device)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        self._group.allreduce([tensor], options).wait()
        return int(tensor.item())

    def tell(self, key: str, value: str) -> None:
        """Leaves a word for the other ranks."""
        self._store.tell(key, value)

    def hear(self, key: str) -> str:
        """Waits for a word that a rank leaves. Raises InternalError at the timeout."""
        try:
            return self._store.hear(key)
        except RuntimeError as error:
            raise InternalError(f"no rank has said {key!r} within {self.place.timeout_s:g} s: {error}") from error


def _gloo_group(place: RankPlace, store: dist.Store, device: torch.device) -> dist.ProcessGroup:
    assert device.type == "cpu"
    backend = dist.ProcessGroupGloo
    options = backend._Options()
    options._devices = [backend.create_device(hostname=place.host)]
    options._timeout = timedelta(seconds=place.timeout_s)
    return backend(store, place.rank, place.size, options)


def _nccl_group(place: RankPlace, store: dist.Store, device: torch.device) -> dist.ProcessGroup:
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.cuda.set_device(device)
    backend = dist.ProcessGroupNCCL
    options = backend.Options()
    options._timeout = timedelta(seconds=place.timeout_s)
    return backend(store, place.rank, place.size, options)
