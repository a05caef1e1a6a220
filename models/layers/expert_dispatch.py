"""Brings tokens to the ranks that keep their experts, and the experts' weighted sums back.

A dispatcher knows which slots each rank keeps (expert_map.py) and calls the experts with this rank's slots numbered from 0; -1
is a choice that another rank serves. What it returns is this tensor rank's part of a sum over the tensor ranks (Parallel.sum).

Tensor ranks have the same tokens, so nothing moves between them (LocalDispatcher). Data ranks have tokens of their own: few of
them go to every data rank (GatherDispatcher), many only to those that keep one of their experts (AllToAllDispatcher). Each
tensor rank moves all tokens of its data rank to the same tensor rank of others, for the slots that are kept there.

T tokens, C choices, H hidden, D data ranks, N tokens of the data rank that has the most, R rows that came from other ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from ...kernels.expert_terms import Summands, sum_terms
from ...kernels.own_experts import own_experts
from ...kernels.token_rows import pack_rows, unpack_rows
from ..parallel import DataParallel, Parallel, Share

# experts(x_TH, weights_TC, slots_TC) -> out_TH: the weighted sum of each token's choices among this rank's slots, or its terms.
Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Summands]

# Of every rank: up to here it costs less to bring all tokens everywhere than to find out which must go where. All that has been
# measured (benchmarks/gpu/bench_dispatch.py on two H200s: 1.8 against 3.0 ms for 8192 tokens on each).
MAX_GATHERED_ROWS = 16_384


class Dispatcher(Protocol):
    def run(self, x_TH: torch.Tensor, weights_TC: torch.Tensor, slots_TC: torch.Tensor, experts: Experts) -> Summands:
        """out [T, H], or its terms. `weights` float32, `slots` int32, of all ranks."""


class LocalDispatcher:
    """For ranks that all have the same tokens: each computes its own slots' part, and nothing moves."""

    def __init__(self, slots: Share) -> None:
        self._slots = slots

    def run(self, x_TH: torch.Tensor, weights_TC: torch.Tensor, slots_TC: torch.Tensor, experts: Experts) -> Summands:
        mine = self._slots
        if mine.size < mine.total:
            slots_TC = own_experts(slots_TC, first=mine.start, num_own=mine.size)
        return experts(x_TH, weights_TC, slots_TC)


class GatherDispatcher:
    """All tokens to all data ranks, then a sum of which each gets its own tokens' rows.

    Its shapes depend on N alone, and nothing waits for the device, so that a CUDA graph can hold it.
    """

    def __init__(self, slots: Share, data: DataParallel) -> None:
        self._slots, self._data = slots, data

    def run(self, x_TH: torch.Tensor, weights_TC: torch.Tensor, slots_TC: torch.Tensor, experts: Experts) -> torch.Tensor:
        data, mine = self._data, self._slots
        num_tokens, num_choices = slots_TC.shape
        rows_NW = pack_rows(x_TH, weights_TC, slots_TC, num_rows=max(data.rank_tokens), is_padding_T=data.is_padding_T)
        rows_RW = data.all_gather_rows(rows_NW)
        out = experts(*unpack_rows(rows_RW, x_TH, num_choices, first=mine.start, num_own=mine.size))
        return data.reduce_scatter_rows(sum_terms(out))[:num_tokens]


class AllToAllDispatcher:
    """Each token to the data ranks that keep one of its experts, and from each a weighted sum back.

    The host waits for the device once, to know how many tokens come and go.

    Args:
        owners: int64 [slots], the data rank that keeps each slot; D for a slot of another tensor rank.
    """

    def __init__(self, slots: Share, data: DataParallel, owners: torch.Tensor) -> None:
        self._slots, self._data, self._owners = slots, data, owners

    def run(self, x_TH: torch.Tensor, weights_TC: torch.Tensor, slots_TC: torch.Tensor, experts: Experts) -> torch.Tensor:
        data, mine, num_ranks = self._data, self._slots, self._data.size
        goes_TD = torch.zeros(len(x_TH), num_ranks + 1, dtype=torch.bool, device=x_TH.device)
        goes_TD = goes_TD.scatter_(1, self._owners[slots_TC.long()], True)[:, :num_ranks]
        counts_D1 = goes_TD.sum(0).unsqueeze(1)
        ones = [1] * num_ranks
        sent, received = torch.cat([counts_D1, data.exchange_rows(counts_D1, ones, ones)], dim=1).T.tolist()
        places_TD = _places(goes_TD, num_sent=sum(sent))
        rows_TW = pack_rows(x_TH, weights_TC, slots_TC, num_rows=len(x_TH))
        rows_RW = data.exchange_rows(rows_TW[_tokens(places_TD, num_sent=sum(sent))], sent, received)
        came = unpack_rows(rows_RW, x_TH, slots_TC.shape[1], first=mine.start, num_own=mine.size)
        out_RH = sum_terms(experts(*came)) if len(rows_RW) else x_TH[:0]
        parts_SH = torch.nn.functional.pad(data.exchange_rows(out_RH, received, sent), (0, 0, 0, 1))
        out_TH = torch.zeros_like(x_TH, dtype=torch.float32)
        for rank in range(num_ranks):  # in one order, so that runs repeat bit by bit
            out_TH += parts_SH[places_TD[:, rank]]
        return out_TH.to(x_TH.dtype)


class DataDispatcher:
    """Between data ranks, by the shape of the step, which all of them know."""

    def __init__(self, gather: GatherDispatcher, all_to_all: AllToAllDispatcher, data: DataParallel) -> None:
        self._gather, self._all_to_all, self._data = gather, all_to_all, data

    def run(self, x_TH: torch.Tensor, weights_TC: torch.Tensor, slots_TC: torch.Tensor, experts: Experts) -> torch.Tensor:
        is_fixed = self._data.is_padding_T is not None
        is_small = is_fixed or self._data.size * max(self._data.rank_tokens) <= MAX_GATHERED_ROWS
        dispatcher = self._gather if is_small else self._all_to_all
        return dispatcher.run(x_TH, weights_TC, slots_TC, experts)


def choose_dispatcher(parallel: Parallel, slots: Share, *, device: torch.device) -> Dispatcher:
    """Of a sparse layer of which this rank keeps `slots`."""
    data = parallel.data
    if data is None:
        return LocalDispatcher(slots)
    owners = torch.full((slots.total,), data.size, dtype=torch.int64)
    for rank in range(data.size):
        owners[parallel.expert_share(slots.total, rank).range] = rank
    return DataDispatcher(GatherDispatcher(slots, data), AllToAllDispatcher(slots, data, owners.to(device)), data)


def _places(goes_TD: torch.Tensor, *, num_sent: int) -> torch.Tensor:
    """Where each token lies among the rows that are sent, by rank and then by token: int64 [T, D]; num_sent where it stays."""
    order_DT = goes_TD.T.reshape(-1).cumsum(0).view(goes_TD.shape[1], -1) - 1
    return torch.where(goes_TD, order_DT.T, num_sent)


def _tokens(places_TD: torch.Tensor, *, num_sent: int) -> torch.Tensor:
    """The token of each row that is sent: int64 [num_sent]."""
    tokens_T1 = torch.arange(len(places_TD), device=places_TD.device).unsqueeze(1)
    tokens = places_TD.new_zeros(num_sent + 1)
    return tokens.scatter_(0, places_TD.flatten(), tokens_T1.expand_as(places_TD).flatten())[:num_sent]
