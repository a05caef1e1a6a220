"""What ranks of a tensor-parallel group do in tests: here, because processes that are spawned must be able to import it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from pilotfish.models.build import load_model
from pilotfish.models.causal_lm import CausalLM
from pilotfish.models.check import RankRows, compare_on_rank
from pilotfish.models.layers.moe import SparseMlp
from pilotfish.models.paged_sequences import PagedSequences
from pilotfish.models.parallel import Parallel, StartedSum
from pilotfish.scheduler.expert_balancer import first_slots


def compare_all(parallel: Parallel, checkpoints: Sequence[tuple[str, str]]) -> list[RankRows]:
    """Of each (checkpoint, file of references)."""
    return [compare_on_rank(parallel, path, references) for path, references in checkpoints]


def load_and_decode(parallel: Parallel, path: str, prompt: list[int], num_tokens: int) -> list[int]:
    return decode_greedily(load_model(path, device="cpu", parallel=parallel), prompt, num_tokens)


def decode_greedily(model: CausalLM, prompt: list[int], num_tokens: int) -> list[int]:
    paged, new, tokens = PagedSequences(model, num_sequences=1, max_len=len(prompt) + num_tokens), prompt, []
    while len(tokens) < num_tokens:
        new = [int(paged.extend({0: new})[0][-1].argmax())]
        tokens += new
    return tokens


def fail_on_the_last_rank(parallel: Parallel) -> None:
    if parallel.rank == parallel.size - 1:
        raise ValueError("no more")
    parallel.sum(torch.ones(1))  # waits for it


def hang(parallel: Parallel, pid_directory: str) -> None:
    (Path(pid_directory) / str(os.getpid())).touch()
    time.sleep(600)


def compare_all_with_whole_experts(parallel: Parallel, checkpoints: Sequence[tuple[str, str]]) -> list[RankRows]:
    return compare_all(replace(parallel, whole_experts=True), checkpoints)


def compare_all_in_halves(parallel: Parallel, checkpoints: Sequence[tuple[str, str]]) -> tuple[list[RankRows], int]:
    """And how many sums were started; by turns into x, as NCCL does it, and with the other rank's addend brought here."""
    num_started = 0

    def start_sum(x: torch.Tensor) -> StartedSum:
        nonlocal num_started
        num_started += 1
        if num_started % 2:
            return StartedSum(x, dist.all_reduce(x, async_op=True).wait)
        addends = [torch.empty_like(x) for _ in range(parallel.size)]
        return StartedSum(x, dist.all_gather(addends, x, async_op=True).wait, addends[1 - parallel.rank])

    return compare_all(replace(parallel, start_sum=start_sum), checkpoints), num_started


def compare_all_with_copied_experts(
    parallel: Parallel, checkpoints: Sequence[tuple[str, str]], num_redundant: int
) -> list[RankRows]:
    return compare_all(_with_copies(parallel, num_redundant), checkpoints)


def check_copies(parallel: Parallel, path: str, num_redundant: int) -> list[list[int]]:
    """The experts in this rank's slots, by sparse layer, whose weights are those of a model that has each expert once."""
    model, plain = (load_model(path, device="cpu", parallel=p) for p in (_with_copies(parallel, num_redundant), Parallel()))
    layers = [(a.mlp, b.mlp) for a, b in zip(model.decoder_layers, plain.decoder_layers, strict=True)]
    kept = []
    for layer, whole_layer in layers:
        if isinstance(layer, SparseMlp):
            kept.append(list(layer.map.experts_in(layer.slots)))
            for weights, of_all in zip(layer.experts.of_slots, whole_layer.experts.of_slots, strict=True):
                assert torch.equal(weights, of_all[kept[-1]])
    return kept


def _with_copies(parallel: Parallel, num_redundant: int) -> Parallel:
    rule = partial(first_slots, num_redundant=num_redundant, num_ranks=parallel.size)
    return replace(parallel, whole_experts=True, first_slots=rule)


def count_read_experts(parallel: Parallel, path: str) -> int:
    """Numbers that this rank keeps of the experts of all sparse layers."""
    model = load_model(path, device="cpu", parallel=replace(parallel, whole_experts=True))
    return sum(p.numel() for name, p in model.named_parameters() if "gate_up_weight" in name or "down_weight" in name)


def load_and_decode_with_whole_experts(parallel: Parallel, path: str, prompt: list[int], num_tokens: int) -> list[int]:
    return load_and_decode(replace(parallel, whole_experts=True), path, prompt, num_tokens)
