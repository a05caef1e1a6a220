"""The ranks of one replica as process groups: this file and data_group.py are the only ones that know torch.distributed.

Life cycle: the leader opens a Rendezvous on a free port; every rank joins it with `RankGroup.join`, in any order. All ranks
call the same collectives in the same order. Each ends within the timeout: with its result, or with an exception, after which
the group is of no use and its processes end. From `join` to `end_set_up` the timeout is that of a start, since one rank may
have to load and compile for minutes what another finds in its caches. `close` ends the groups in a process that goes on. A
message of another epoch is never seen: it is part of every key of the store.

gloo serves CPUs, NCCL GPUs; what is small goes through memory that the ranks of one machine share (peer_collectives.py). Such a
collective waits for `timeout_s` too, but cannot raise: `check` does, once its step has ended. NVLink multicast stays off
(NCCL_NVLS_ENABLE=0 in the worker's environment, see ray_launcher.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions

from ..common.errors import InternalError
from ..common.rank_place import LEADER, RankPlace
from ..kernels.dispatch import kernel_mode
from ..kernels.rms_norm import rms_norm
from ..models.parallel import Parallel, StartedSum
from ..scheduler.expert_balancer import first_slots
from .data_group import DataGroup, StepExchange, finish
from .peer_collectives import MAX_ONE_SHOT_SENT_BYTES, PeerCollectives
from .peer_memory import CAPACITY_BYTES, open_peer_buffers
from .pushed_sums import NUM_RANKS, NUM_SLOTS, PushedSums, open_pushed_sums

logger = logging.getLogger(__name__)

# Of NCCL's sum beside products. Prefill of Qwen3-8B on two H200s: 0.925 s with 4 of them, 0.869 with 8, 0.891 with all of
# NCCL's, and 0.906 with no sum beside anything.
_CTAS_BESIDE = 8
# Of a half of a step with sparse layers. Qwen3-30B-A3B on two H200s: experts take 451 and 262 us for 4096 tokens, 735 and 446
# for 8192, so that a step of 8192 is quicker whole (0.549 s against 0.621).
MIN_SPARSE_HALF_TOKENS = 8192


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
    """The collectives between the tensor ranks of one data rank, as one of them sees them.

    Attributes:
        peers: what small collectives go through; None where the process group serves alone.
        pushed: what large sums go through; None where the process group serves.
        data: between data ranks, where there are several.
        steps: between their leaders, on a leader.
    """

    def __init__(
        self,
        place: RankPlace,
        store: RankStore,
        group: dist.ProcessGroup | None,
        device: torch.device,
        *,
        data: DataGroup | None = None,
        steps: StepExchange | None = None,
        everyone: dist.ProcessGroup | None = None,
        beside: dist.ProcessGroup | None = None,
    ) -> None:
        self.place = place
        self.data = data
        self.steps = steps
        self._store = store
        self._group = group  # None of one tensor rank
        self._everyone = everyone  # all ranks in the order of their numbers, where experts move between them
        self._beside = beside  # as `group`, for sums that run beside products
        self._device = device
        self.peers: PeerCollectives | None = None
        self.pushed: PushedSums | None = None

    @classmethod
    def join(cls, place: RankPlace, device: torch.device, *, peer_capacity_bytes: int = CAPACITY_BYTES) -> RankGroup:
        """Waits for all ranks. `peer_capacity_bytes`: the largest message of their shared memory.

        Raises:
            InternalError: they have not all come within the timeout.
        """
        try:
            store = RankStore(place)
            make = _nccl_group if device.type == "cuda" else _gloo_group
            group, data, steps, sums = None, None, None, None
            tensor_ranks, data_ranks = f"tensor-ranks-{place.data_rank}", f"data-ranks-{place.rank}"
            beside = replace(place, rank=place.data_rank, size=place.data_size)
            if place.size > 1:
                group = make(place, dist.PrefixStore(tensor_ranks, store.store), device)
                if device.type == "cuda":
                    sums = _nccl_group(place, dist.PrefixStore(f"sums-{place.data_rank}", store.store), device, beside=True)
            if place.data_size > 1:
                data = DataGroup(beside, make(beside, dist.PrefixStore(data_ranks, store.store), device))
                if place.is_leader:
                    steps = StepExchange(
                        beside, _gloo_group(beside, dist.PrefixStore("steps", store.store), torch.device("cpu"))
                    )
            everyone = group if data is None else data.group
            if place.balances_experts and place.size > 1 and place.data_size > 1:
                everyone = make(
                    replace(place, rank=place.number, size=place.num_ranks), dist.PrefixStore("all-ranks", store.store), device
                )
            joined = cls(place, store, group, device, data=data, steps=steps, everyone=everyone, beside=sums)
            joined.agree_on_least(place.number)  # the first collectives connect them
            if group is not None:
                joined.peers = joined._open_peers(place, tensor_ranks, peer_capacity_bytes)
            if data is not None:
                data.peers = joined._open_peers(beside, data_ranks, peer_capacity_bytes)
            joined._limit(place.start_timeout_s)
        except (RuntimeError, ValueError) as error:
            raise InternalError(
                f"rank {place.number} of {place.num_ranks} found no group of all ranks at {place.address} within "
                f"{place.timeout_s:g} s: {' '.join(str(error).split())[:300]}"
            ) from error
        return joined

    def _open_peers(self, place: RankPlace, name: str, capacity_bytes: int) -> PeerCollectives | None:
        """Of the group in which this rank has `place`; all ranks of all groups do this together."""
        if self._device.type != "cuda":
            return None
        buffers = open_peer_buffers(
            place,
            self._store,
            self._device,
            name=name,
            agree_on_least=self.agree_on_least,
            capacity_bytes=capacity_bytes,
        )
        return None if buffers is None else PeerCollectives(buffers)

    def open_large_sums(self, max_bytes: int) -> None:
        """Before the first sum, with the norm behind it or beside products, of up to `max_bytes`. All ranks together, once.

        Two ranks that have memory in common then move it by copy engine, and keep NUM_SLOTS times as much memory for it.
        """
        if self._beside is None or max_bytes <= MAX_ONE_SHOT_SENT_BYTES:
            return
        if self.place.size == NUM_RANKS and self.peers is not None:
            self.pushed = open_pushed_sums(
                self.place,
                self._store,
                self._device,
                name=f"pushed-sums-{self.place.data_rank}",
                agree_on_least=self.agree_on_least,
                max_bytes=max_bytes,
            )
        if self.pushed is None:
            logger.info("large sums: by NCCL, beside products on %d multiprocessors", _CTAS_BESIDE)
        else:
            logger.info("large sums: by copy engines, through %.0f MB", NUM_SLOTS * self.pushed.max_bytes / 1e6)

    @property
    def parallel(self) -> Parallel:
        place, rule = self.place, None
        if place.balances_experts:
            rule = partial(first_slots, num_redundant=place.num_redundant_experts, num_ranks=place.num_ranks)
        return Parallel(
            rank=place.rank,
            size=place.size,
            whole_experts=place.whole_experts,
            first_slots=rule,
            all_reduce=self.all_reduce if place.size > 1 else None,
            all_gather=self.all_gather if place.size > 1 else None,
            all_reduce_norm=None if self.peers is None or kernel_mode() == "invariant" else self.all_reduce_norm,
            start_sum=None if self._beside is None else self.start_sum,
            min_started_bytes=MAX_ONE_SHOT_SENT_BYTES,
            min_sparse_half_tokens=MIN_SPARSE_HALF_TOKENS,
            data=None if self.data is None else self.data.parallel,
        )

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's x; x itself may become it."""
        if self.peers is not None and (total := self.peers.all_reduce(x)) is not None:
            return total
        assert self._group is not None
        x = x.contiguous()
        options = dist.AllreduceOptions()
        options.asyncOp = False
        finish(self._group.allreduce([x], options))
        return x

    def start_sum(self, x: torch.Tensor) -> StartedSum:
        """Begins `all_reduce` of x, contiguous, beside what is queued next."""
        if self.pushed is not None and (started := self.pushed.start(x)) is not None:
            return started
        assert self._beside is not None
        work = self._beside.allreduce([x], dist.AllreduceOptions())
        return StartedSum(x, partial(finish, work))

    def all_reduce_norm(
        self, x_TH: torch.Tensor, residual_TH: torch.Tensor, weight_H: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(s), s), where s is the residual plus the sum of every rank's x.

        One kernel where x is small; copies and one kernel where it is large and `pushed` is there.
        """
        if self.peers is not None and (both := self.peers.all_reduce_norm(x_TH, residual_TH, weight_H, eps)) is not None:
            return both
        if self.pushed is not None and (started := self.pushed.start(x_TH.contiguous())) is not None:
            return started.wait_and_norm(residual_TH, weight_H, eps)
        return rms_norm(self.all_reduce(x_TH), weight_H, eps, residual_TH=residual_TH)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's x of one shape, joined along the last dimension in the order of ranks."""
        parts = None if self.peers is None else self.peers.all_gather(x)
        if parts is None:
            assert self._group is not None
            x = x.contiguous()
            rows = x.new_empty((self.place.size * x.shape[0], *x.shape[1:]))
            options = AllgatherOptions()
            options.asyncOp = False
            finish(self._group._allgather_base(rows, x, options))
            parts = rows.view(self.place.size, *x.shape)
        return parts.movedim(0, -2).flatten(-2)

    def broadcast(self, x: torch.Tensor) -> None:
        """x becomes the leader's."""
        assert self._group is not None
        options = dist.BroadcastOptions()
        options.rootRank = LEADER
        options.asyncOp = False
        finish(self._group.broadcast([x], options))

    def sum_over_all(self, x: torch.Tensor) -> None:
        """x, contiguous, becomes the sum over all ranks, tensor and data ranks."""
        assert self._everyone is not None
        options = dist.AllreduceOptions()
        options.asyncOp = False
        finish(self._everyone.allreduce([x], options))

    def exchange_rows(
        self, incoming: torch.Tensor, outgoing: torch.Tensor, *, received: Sequence[int], sent: Sequence[int]
    ) -> None:
        """`sent` [ranks] rows of `outgoing` go to each rank, in order, and `received` of each come into `incoming`.

        Between all ranks, tensor and data ranks. Both are contiguous, of one dtype, and have just these rows.
        """
        assert self._everyone is not None
        options = dist.AllToAllOptions()
        options.asyncOp = False
        finish(self._everyone.alltoall_base(incoming, outgoing, list(received), list(sent), options))

    def agree_on_least(self, value: int) -> int:
        """The least of the values of all ranks, tensor and data ranks."""
        tensor = torch.tensor([value], dtype=torch.int64, device=self._device)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        if self._group is not None:
            finish(self._group.allreduce([tensor], options))
        if self.data is not None:
            finish(self.data.group.allreduce([tensor], options))
        return int(tensor.item())

    def end_set_up(self) -> None:
        """Every rank is about to serve: from now on collectives wait no longer than the place's `timeout_s`."""
        self._limit(self.place.timeout_s)

    def _limit(self, timeout_s: float) -> None:
        for group in self._groups() + ([] if self.steps is None else [self.steps.group]):
            group._set_default_timeout(timedelta(seconds=timeout_s))

    def abort(self) -> None:
        """Ends the collectives under way, with an error or with nonsense, and the group with them. From any thread."""
        for peers in self._all_peers():
            peers.buffers.end_waits()
        self._abort_groups()

    def close(self) -> None:
        """At a normal end, when this rank has seen its last step end and no other works any more. May be called again.

        A process that ends with os._exit need not. torch's `shutdown` would wait for the other ranks, which may have left;
        `abort` frees what is here, and ends the threads that watch the groups.
        """
        try:
            self._abort_groups()
        except RuntimeError as error:
            logger.warning("rank %d could not free its groups: %s", self.place.number, error)

    def _abort_groups(self) -> None:
        for group in self._groups():
            group.abort()

    def _groups(self) -> list[dist.ProcessGroup]:
        """Each once."""
        data = None if self.data is None else self.data.group
        return list(dict.fromkeys(group for group in (self._group, data, self._everyone, self._beside) if group is not None))

    def check(self) -> None:
        """Asked when a step has ended, before its results are used: InternalError where it waited in vain for a rank."""
        for peers in self._all_peers():
            peers.check()

    def _all_peers(self) -> list[PeerCollectives]:
        everything = (
            self.peers,
            None if self.data is None else self.data.peers,
            None if self.pushed is None else self.pushed.peers,
        )
        return [peers for peers in everything if peers is not None]

    def tell(self, key: str, value: str) -> None:
        """Leaves a word for the other tensor ranks."""
        self._store.tell(f"{self.place.data_rank}.{key}", value)

    def hear(self, key: str) -> str:
        """Waits for a word that a tensor rank leaves. Raises InternalError at the timeout."""
        try:
            return self._store.hear(f"{self.place.data_rank}.{key}")
        except RuntimeError as error:
            raise InternalError(f"no rank has said {key!r} within {self.place.timeout_s:g} s: {error}") from error


def _gloo_group(place: RankPlace, store: dist.Store, device: torch.device) -> dist.ProcessGroup:
    assert device.type == "cpu"
    backend = dist.ProcessGroupGloo
    options = backend._Options()
    options._devices = [backend.create_device(hostname=place.host)]
    options._timeout = timedelta(seconds=place.timeout_s)
    return backend(store, place.rank, place.size, options)


def _nccl_group(place: RankPlace, store: dist.Store, device: torch.device, *, beside: bool = False) -> dist.ProcessGroup:
    """`beside`: its collectives find room beside a product that fills the GPU, and leave most of the GPU to that."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    # Else a thread asks the leader's store every second whether to dump torch's trace of collectives, and where the store has
    # gone with the leader it complains with a stack of C++. Of a rank that is stuck rank_watch.py tells.
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "0")
    torch.cuda.set_device(device)
    backend = dist.ProcessGroupNCCL
    options = backend.Options()
    if beside:
        options.is_high_priority_stream = True
        options.config.max_ctas = _CTAS_BESIDE
    options._timeout = timedelta(seconds=place.timeout_s)
    return backend(store, place.rank, place.size, options)
