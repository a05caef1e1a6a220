"""Arrivals for the simulation, from a seed: shared system prompts with bursts of new ones, conversations, nothing shared.

Rates are for each replica and put it at two thirds or so of what it can do when nothing that is cached is computed again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from replica_simulation import Conversation, Turn

_VOCABULARY = 50_000
_SYSTEM_TOKENS = 2048
_BURST_REQUESTS = 8
_BURST_MS = 20.0


@dataclass(frozen=True, slots=True)
class Workload:
    """`bursts` are the prompts' beginnings that come new and many times at once."""

    conversations: tuple[Conversation, ...]
    bursts: tuple[tuple[int, ...], ...] = ()


def _tokens(rng: random.Random, number: int) -> tuple[int, ...]:
    return tuple(rng.choices(range(_VOCABULARY), k=number))


def _arrivals(rng: random.Random, number: int, *, per_s: float) -> Iterator[float]:
    now_ms = 0.0
    for _ in range(number):
        now_ms += rng.expovariate(per_s) * 1e3
        yield now_ms


def shared_prompts(rng: random.Random, *, num_replicas: int, num_requests: int) -> Workload:
    """Three system prompts a replica, some liked more than others (Zipf), each with a question; one request in ten is of a
    burst."""
    prompts = [_tokens(rng, _SYSTEM_TOKENS) for _ in range(3 * num_replicas)]
    weights = [1 / rank for rank in range(1, len(prompts) + 1)]

    def ask(system: tuple[int, ...], arrival_ms: float) -> Conversation:
        return Conversation(arrival_ms, (Turn(system + _tokens(rng, rng.randint(64, 256)), rng.randint(32, 128)),))

    conversations, bursts = [], []
    for arrival_ms in _arrivals(rng, num_requests * 9 // 10, per_s=35.0 * num_replicas):
        conversations.append(ask(rng.choices(prompts, weights)[0], arrival_ms))
    end_ms = conversations[-1].arrival_ms
    for _ in range(max(1, num_requests // 10 // _BURST_REQUESTS)):
        bursts.append(_tokens(rng, _SYSTEM_TOKENS))
        start_ms = rng.uniform(0.0, end_ms)
        conversations += [ask(bursts[-1], start_ms + rng.uniform(0.0, _BURST_MS)) for _ in range(_BURST_REQUESTS)]
    return Workload(tuple(conversations), tuple(bursts))


def multi_turn_chat(rng: random.Random, *, num_replicas: int, num_requests: int) -> Workload:
    """Three to six turns under one short system prompt; people take a second or so to answer."""
    system, conversations = _tokens(rng, 256), []
    for arrival_ms in _arrivals(rng, num_requests * 2 // 9, per_s=5.5 * num_replicas):
        turns = [
            Turn(_tokens(rng, rng.randint(50, 600)), rng.randint(32, 160), think_ms=rng.uniform(300.0, 1500.0))
            for _ in range(rng.randint(3, 6))
        ]
        first = Turn(system + turns[0].tokens, turns[0].num_output)
        conversations.append(Conversation(arrival_ms, (first, *turns[1:])))
    return Workload(tuple(conversations))


def nothing_shared(rng: random.Random, *, num_replicas: int, num_requests: int) -> Workload:
    """Prompts of 128 to 2048 tokens that have nothing in common."""
    return Workload(
        tuple(
            Conversation(arrival_ms, (Turn(_tokens(rng, rng.randint(128, 2048)), rng.randint(32, 128)),))
            for arrival_ms in _arrivals(rng, num_requests, per_s=17.0 * num_replicas)
        )
    )


WORKLOADS: Mapping[str, Callable[..., Workload]] = {
    "shared-prompts": shared_prompts,
    "multi-turn-chat": multi_turn_chat,
    "nothing-shared": nothing_shared,
}
