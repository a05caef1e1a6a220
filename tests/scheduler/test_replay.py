"""Traces of arrivals: reading them, and the router over real step schedulers in virtual time."""

from __future__ import annotations

import json
import random

import pytest
from pilotfish.common.errors import InvalidRequest
from pilotfish.common.hashing import block_hashes, root_hash
from pilotfish.scheduler.arrivals import Arrival, read_arrivals
from pilotfish.scheduler.replay import Replay
from pilotfish.scheduler.router import RouterConfig
from pilotfish.scheduler.scheduler_config import SchedulerConfig
from pilotfish.scheduler.step_times import StepTime

SIZE = 16


def replay_of(num_replicas=4, *, num_blocks=1024, max_num_seqs=16, **config):
    engine = SchedulerConfig(
        num_blocks=num_blocks, block_size=SIZE, max_num_seqs=max_num_seqs, max_num_batched_tokens=512, max_model_len=8192
    )
    return Replay.create(RouterConfig(block_size=SIZE, **config), engine, StepTime.line(4.0, 0.05), num_replicas=num_replicas)


def tokens(rng, number):
    return tuple(rng.choices(range(50_000), k=number))


def traffic(seed, number=300):
    """Shared system prompts with questions, and bursts of new ones."""
    rng, now_ms, arrivals = random.Random(seed), 0.0, []
    systems = [tokens(rng, rng.randint(100, 1500)) for _ in range(6)]
    for index in range(number):
        now_ms += rng.expovariate(1 / 8.0)
        system = tokens(rng, 1200) if index % 40 == 0 else rng.choice(systems)
        for _ in range(6 if index % 40 == 0 else 1):
            prompt = system + tokens(rng, rng.randint(5, 80))
            arrivals.append(Arrival(time_ms=now_ms, token_ids=prompt, output_tokens=rng.randint(1, 60)))
    return arrivals


@pytest.mark.parametrize("seed", range(3))
def test_every_arrival_is_answered_and_nothing_is_left_in_the_books(seed):
    replay = replay_of(num_blocks=400, max_num_seqs=6)
    arrivals = traffic(seed)
    requests = replay.run(arrivals)
    assert [request.num_output for request in requests] == [arrival.output_tokens for arrival in arrivals]
    assert all(r.arrival.time_ms < r.first_token_ms <= r.end_ms for r in requests)
    for name, replica in replay._replicas.items():
        state = replay.router.state(name, replica.scheduler.load())
        assert (state.num_requests, state.num_held, state.queued_tokens, state.expected_blocks) == (0, 0, 0, 0)
        assert (state.drift_requests, state.drift_tokens, state.drift_blocks) == (0, 0, 0)
        confirmed = replay.router.trie.confirmed_blocks(name)
        assert confirmed == {block.block_hash for block in replica.scheduler.snapshot().blocks}


def test_two_runs_are_equal():
    first, second = (
        [(r.replica, r.was_held, r.first_token_ms, r.end_ms, r.cached_tokens) for r in replay_of().run(traffic(0))]
        for _ in range(2)
    )
    assert first == second


def test_a_cold_burst_is_computed_once():
    rng = random.Random(0)
    prefix = tokens(rng, 1600)
    arrivals = [Arrival(time_ms=float(i), token_ids=prefix + tokens(rng, 9), output_tokens=20) for i in range(8)]
    requests = replay_of().run(arrivals)
    assert len({request.replica for request in requests}) == 1
    assert sorted(request.cached_tokens for request in requests) == [0] + [1600] * 7


def test_cold_prompts_do_not_herd_onto_a_replica_that_comes_new():
    """Three replicas are warm and busy; the fourth starts: it gets what it can start, and the others go on getting theirs."""
    replay, rng = replay_of(num_replicas=3), random.Random(0)
    cold = [Arrival(time_ms=100.0 + i / 10, token_ids=tokens(rng, 1000), output_tokens=30) for i in range(24)]
    warm = [Arrival(time_ms=float(i), token_ids=tokens(rng, 300), output_tokens=80) for i in range(12)]
    fresh = replay_of(num_replicas=1)
    name = "replica-3"
    replay._replicas[name] = fresh._replicas["replica-0"]
    replay._at(99.0, lambda: replay.router.add_replica(name, fresh.router._limits["replica-0"]))
    chosen = [r.replica for r in replay.run(warm + cold) if r.arrival.time_ms >= 100]
    assert 6 <= chosen.count(name) <= 12


def test_a_prompt_that_never_fits_ends_with_its_error():
    arrivals = [
        Arrival(time_ms=0.0, token_ids=tuple(range(2000)), output_tokens=2),
        Arrival(time_ms=1.0, token_ids=(1, 2), output_tokens=2),
    ]
    too_long, other = replay_of(num_replicas=1, num_blocks=64).run(arrivals)
    assert "do not fit in the KV" in too_long.error
    assert (other.error, other.num_output) == ("", 2)


def test_a_prompt_may_be_named_by_its_hashes():
    """Where two prompts shared blocks, so do the made-up ones."""
    rng = random.Random(0)
    prefix = tokens(rng, 64)
    prompts = [prefix + tokens(rng, 20), prefix + tokens(rng, 25), tokens(rng, 70)]
    lines = []
    for number, prompt in enumerate(prompts):
        names = [block_hash.hex() for block_hash in block_hashes(prompt, SIZE, parent=root_hash())]
        row = {"time_ms": 9 - number, "block_hashes": names, "num_tokens": len(prompt), "output_tokens": 3, "tenant": "t"}
        lines += [json.dumps(row), ""]
    arrivals = read_arrivals(lines, block_size=SIZE)
    assert [len(arrival.token_ids) for arrival in arrivals] == [70, 89, 84], "by time"
    other, second, first = (block_hashes(arrival.token_ids, SIZE, parent=root_hash()) for arrival in arrivals)
    assert first[:4] == second[:4]
    assert first[4] != second[4]
    assert not set(other) & set(first)
    assert {arrival.tenant for arrival in arrivals} == {"t"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense", "line 1 of the trace is no arrival"),
        ('{"time_ms": 1, "token_ids": [1]}', "'output_tokens' is missing"),
        ('{"time_ms": 1, "output_tokens": 1}', "either token_ids or block_hashes"),
        ('{"time_ms": 1, "output_tokens": 1, "token_ids": []}', "at least one token"),
        ('{"time_ms": 1, "output_tokens": 1, "token_ids": [1], "text": "x"}', "'text' is not a field"),
        ('{"time_ms": 1, "output_tokens": 1, "block_hashes": ["00"], "num_tokens": 5}', "do not have 1 full blocks"),
        ('{"time_ms": 1, "output_tokens": 1, "block_hashes": ["xx"], "num_tokens": 16}', "line 1 of the trace"),
    ],
)
def test_a_bad_line_says_what_is_wrong(line, reason):
    with pytest.raises(InvalidRequest, match=reason):
        read_arrivals([line], block_size=SIZE)
