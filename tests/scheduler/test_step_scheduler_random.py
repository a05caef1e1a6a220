"""Random arrivals, aborts, errors, priorities, tiny caches: every sequence gets exactly what it gets alone."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from pilotfish.common.hashing import block_hashes
from pilotfish.common.requests import BlockStored, FinishReason
from pilotfish.common.tenants import ANONYMOUS, Tenant

END_TOKENS = (0, 1, 2)


TENANTS = (ANONYMOUS, Tenant("large", 5.0), Tenant("small", 0.5))


def _random_request(rng, request_of, number, *, max_prompt, max_tokens):
    shared = [rng.randrange(2) for _ in range(rng.randrange(3))]
    common = [sum(shared) + i for i in range(max_prompt)]
    length = rng.randint(1, max_prompt)
    cut = rng.randint(0, length)
    prompt = common[:cut] + [rng.randrange(8) for _ in range(length - cut)]
    return request_of(
        f"r{number}",
        prompt,
        max_tokens=rng.randint(1, max_tokens),
        min_tokens=rng.randint(0, 1),
        end_token_ids=END_TOKENS if rng.random() < 0.7 else (),
        priority=rng.choice((0, 0, 0, 1, 5)),
        salt=rng.choice((b"", b"", b"tenant")),
        tenant=rng.choice(TENANTS),
    )


def _with_known_outputs(rng, request, tokens):
    return replace(request, output_token_ids=tuple(tokens[: rng.randint(0, len(tokens))]))


class _KvMirror:
    """A reader of the events: the set of stored blocks, checked against the snapshot."""

    def __init__(self):
        self.next_id, self.stored = 1, {}

    def check(self, scheduler):
        first_id, events = scheduler.drain_kv_events()
        assert first_id == self.next_id
        self.next_id += len(events)
        for event in events:
            if isinstance(event, BlockStored):
                assert event.block_hash not in self.stored
                self.stored[event.block_hash] = event.parent_hash
            else:
                parent = self.stored.pop(event.block_hash)
                assert parent is not None
                assert event.block_hash not in self.stored.values(), "a parent was removed before its child"
        snapshot = scheduler.snapshot()
        assert {block.block_hash: block.parent_hash for block in snapshot.blocks} == self.stored
        assert snapshot.next_event_id == self.next_id
        seen = set()
        for block in snapshot.blocks:
            assert block.parent_hash in seen or block.parent_hash not in self.stored
            seen.add(block.block_hash)


def _weak_hashes(token_ids, block_size, *, parent):
    """Chained hashes of three bits: most blocks collide."""
    return [bytes([block_hash[0] % 8]) for block_hash in block_hashes(token_ids, block_size, parent=parent)]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(60))
def test_every_sequence_gets_what_it_gets_alone(seed, depth, make_engine, request_of, output_of):
    _check_random_operations(random.Random(seed), depth, make_engine, request_of, output_of)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(20))
def test_collisions_of_hashes_change_no_token(seed, depth, monkeypatch, *, make_engine, request_of, output_of):
    monkeypatch.setattr("pilotfish.scheduler.sequence_cache.block_hashes", _weak_hashes)
    _check_random_operations(random.Random(seed), depth, make_engine, request_of, output_of)


def _check_random_operations(rng, depth, make_engine, request_of, output_of):
    max_num_seqs = rng.randint(1, 6)
    engine = make_engine(
        depth=depth,
        num_blocks=rng.choice((6, 8, 12, 40)),
        block_size=rng.choice((1, 2, 4)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.choice((0, 1, 7, 40)),
        max_model_len=rng.choice((24, 60)),
        prefix_caching=rng.random() < 0.8,
        priority_aging_steps=rng.choice((1, 10, 1000)),
    )
    mirror = _KvMirror()
    requests, ended_by_us = {}, set()
    num_requests = rng.randint(5, 25)
    while len(requests) < num_requests or engine.scheduler.has_work:
        if len(requests) < num_requests and rng.random() < 0.4:
            request = _random_request(rng, request_of, len(requests), max_prompt=20, max_tokens=25)
            if rng.random() < 0.2:
                tokens, _ = output_of(request, engine.config)
                request = _with_known_outputs(rng, request, tokens)
            requests[request.request_id] = engine.add(request)
        if requests and rng.random() < 0.04:
            victim = rng.choice(list(requests))
            if engine.scheduler.abort(victim):
                ended_by_us.add(victim)
            engine.collect()
        if engine.results and rng.random() < 0.03:
            planned = [
                row.request_id for plan in engine.plans for row in plan.rows if plan.step_id == engine.results[0].step_id
            ]
            victim = rng.choice(planned)
            engine.deliver(errors={victim: "injected"})
            ended_by_us.add(victim)
        elif engine.results and rng.random() < 0.2:
            engine.deliver()
        else:
            engine.step()
        mirror.check(engine.scheduler)
    engine.run()
    for request_id, request in requests.items():
        if request_id in ended_by_us:
            tokens, _ = output_of(request, engine.config)
            got, known = engine.tokens(request_id), len(request.output_token_ids)
            assert got == tokens[known : known + len(got)]
            assert engine.finish_reason(request_id) is not None
        elif len(request.prompt_token_ids) >= engine.config.max_model_len:
            assert engine.finish_reason(request_id) == FinishReason.ERROR
        else:
            engine.check_output(request)
    load = engine.scheduler.load()
    assert load.num_used_blocks == load.num_running == load.num_waiting == load.queued_tokens == 0
