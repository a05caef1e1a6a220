"""The ledger of what was sent where, against a real step scheduler's own count of it."""

from __future__ import annotations

import random

import pytest
from pilotfish.common.hashing import block_hashes, root_hash
from pilotfish.common.requests import EngineLoad, SequenceOutput, StepOutput
from pilotfish.scheduler.ledger import Drift, Ledger
from pilotfish.scheduler.router import ReplicaLimits, Router, RouterConfig

SIZE = 4


def hashes_of(tokens):
    return block_hashes(tokens, SIZE, parent=root_hash())


@pytest.fixture
def ledger():
    ledger = Ledger(block_size=SIZE)
    ledger.add_replica("r")
    return ledger


def lease(ledger, request_id, tokens, *, matched_tokens=0, **fields):
    ledger.open(request_id, "r", hashes=hashes_of(tokens), num_tokens=len(tokens), matched_tokens=matched_tokens, **fields)


def step(num_batched_tokens, *outputs):
    return StepOutput(step_id=1, num_batched_tokens=num_batched_tokens, sequences=tuple(outputs))


def test_a_shared_prefix_counts_once(ledger):
    lease(ledger, "a", [1] * 10)
    lease(ledger, "b", [1] * 9)
    assert ledger.of("r").num_blocks == 4, "two of the prefix, and one more each"
    assert ledger.of("r").num_new_blocks(hashes_of([1] * 8), 3) == 1
    ledger.close("a")
    assert ledger.of("r").num_blocks == 3
    ledger.close("b")
    assert ledger.of("r").num_blocks == 0


def test_what_is_held_is_not_what_was_sent(ledger):
    lease(ledger, "a", [1] * 10, matched_tokens=4, is_held=True)
    account = ledger.of("r")
    assert (account.num_sent, account.num_held, account.queued_tokens, account.held_tokens) == (0, 1, 0, 6)
    assert ledger.drift("r", EngineLoad()) == Drift(0, 0, 0)
    ledger.close("a")
    assert (account.num_held, account.held_tokens, account.num_blocks) == (0, 0, 0)


def test_steps_move_the_oldest_prompt_on(ledger):
    lease(ledger, "a", [1] * 10)
    lease(ledger, "b", [2] * 10)
    ledger.take_step("r", step(6))
    assert ledger.of("r").queued_tokens == 14
    ledger.take_step("r", step(6, SequenceOutput(request_id="a", offset=0, token_ids=(5,))))
    assert ledger.of("r").queued_tokens == 8, "the rest of a, and 2 of b"
    ledger.take_step("r", step(9, SequenceOutput(request_id="a", offset=1, token_ids=(5,))))
    assert ledger.of("r").queued_tokens == 1, "the last one is computed when an output says so"
    ledger.take_step("r", step(1, SequenceOutput(request_id="b", offset=0, token_ids=(5,))))
    assert ledger.of("r").queued_tokens == 0


def test_outputs_of_nobody_and_of_another_replica_change_nothing(ledger):
    ledger.add_replica("other")
    lease(ledger, "a", [1] * 10)
    for request_id, replica in (("nobody", "r"), ("a", "other")):
        ledger.take_step(replica, step(0, SequenceOutput(request_id=request_id, offset=0, token_ids=(5,))))
    assert ledger.of("r").queued_tokens == 10
    ledger.close("nobody")
    assert ledger.of("r").num_sent == 1


def test_a_lost_replica_takes_its_leases_with_it(ledger):
    lease(ledger, "a", [1] * 10)
    ledger.remove_replica("r")
    ledger.add_replica("r")
    ledger.close("a")
    assert ledger.drift("r", EngineLoad()) == Drift(0, 0, 0)


def test_drift_is_what_the_replica_does_not_say(ledger):
    lease(ledger, "a", [1] * 10, matched_tokens=8)
    report = EngineLoad(num_running=1, num_waiting=1, num_used_blocks=5, queued_tokens=1)
    assert ledger.drift("r", report) == Drift(requests=-1, tokens=9, blocks=-2)


def _report(engine, num_outputs_seen):
    """What the engine says after its last step, as its worker would."""
    outputs = []
    for request_id, produced in engine.outputs.items():
        outputs += produced[num_outputs_seen.get(request_id, 0) :]
        num_outputs_seen[request_id] = len(produced)
    first_event_id, events = engine.scheduler.drain_kv_events()
    return StepOutput(
        step_id=len(engine.plans),
        sequences=tuple(outputs),
        first_event_id=first_event_id,
        kv_events=events,
        load=engine.scheduler.load(),
    )


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_against_an_engine_the_drift_is_bounded_in_flight_and_zero_when_idle(make_engine, request_of, seed, depth):
    """Prompts with shared prefixes, chunks, aborts, and steps in flight; blocks enough that nothing is preempted."""
    rng = random.Random(seed)
    engine = make_engine(depth=depth, num_blocks=512, max_num_batched_tokens=16)
    router = Router(RouterConfig(block_size=SIZE))
    router.add_replica("r", ReplicaLimits(max_num_seqs=8, max_num_batched_tokens=16, num_blocks=512))
    prefixes = [[rng.randrange(64) for _ in range(rng.randint(1, 40))] for _ in range(4)]
    seen, num_sent, num_idle, held = {}, 0, 0, {}

    def send(request, tick):
        tokens = list(request.prompt_token_ids)
        choice = router.route(
            request.request_id, hashes=hashes_of(tokens), num_tokens=len(tokens), expected_output_tokens=8, tick=tick
        )
        held[request.request_id] = request
        if not choice.is_held:
            engine.add(held.pop(request.request_id))

    for tick in range(400):
        if rng.random() < 0.2 and tick < 300:
            prompt = [*rng.choice(prefixes), *(rng.randrange(64) for _ in range(rng.randint(1, 12)))]
            send(request_of(f"q{num_sent}", prompt, max_tokens=rng.randint(1, 12)), tick)
            num_sent += 1
        while (request_id := router.next_ready(["r"], tick=tick)) is not None:
            send(held.pop(request_id), tick)
        if rng.random() < 0.05 and engine.scheduler._sequences:
            engine.scheduler.abort(rng.choice(sorted(engine.scheduler._sequences)))
            engine.collect()
        num_plans = len(engine.plans)
        if engine.scheduler.has_work:
            engine.step()
        report = _report(engine, seen)
        batched = sum(plan.num_tokens for plan in engine.plans[num_plans:])
        step = StepOutput(
            step_id=tick,
            sequences=report.sequences,
            first_event_id=report.first_event_id,
            kv_events=report.kv_events,
            num_batched_tokens=batched,
            load=report.load,
        )
        assert router.take_step("r", step)
        state = router.state("r", report.load)
        assert state.drift_requests == 0
        assert abs(state.drift_tokens) <= 3 * 16 + 40, "steps in flight, and one prefix that was expected and is not there yet"
        assert abs(state.drift_blocks) <= -(-state.queued_tokens // SIZE) + 2 * state.num_requests + 10
        assert router.trie.confirmed_blocks("r") == {block.block_hash for block in engine.scheduler.snapshot().blocks}
        if not engine.scheduler.has_work:
            num_idle += 1
            assert (state.drift_tokens, state.drift_blocks, state.queued_tokens, state.expected_blocks) == (0, 0, 0, 0)
    assert num_sent > 30
    assert num_idle > 20
    assert not held


@pytest.mark.parametrize("seed", range(8))
def test_against_an_engine_the_index_survives_lost_doubled_and_reordered_messages(make_engine, request_of, seed):
    """A cache that evicts; its events lost, doubled and out of order. A snapshot then makes the index what the engine holds."""
    rng = random.Random(seed)
    engine = make_engine(num_blocks=40, max_num_batched_tokens=32)
    router = Router(RouterConfig(block_size=SIZE))
    router.add_replica("r")
    trie, messages, num_snapshots, num_exact = router.trie, [], 0, 0
    prefixes = [[rng.randrange(64) for _ in range(24)] for _ in range(6)]
    for number in range(400):
        if rng.random() < 0.3:
            prompt = [*rng.choice(prefixes)[: rng.randint(1, 24)], *(rng.randrange(64) for _ in range(rng.randint(1, 20)))]
            engine.add(f"q{number}", prompt, max_tokens=6)
        if engine.scheduler.has_work:
            engine.step()
        messages.append(engine.scheduler.drain_kv_events())
        if len(messages) < rng.choice((1, 1, 1, 3)):
            continue
        rng.shuffle(messages)
        if rng.random() < 0.1:
            messages.append(messages[0])
        if rng.random() < 0.05:
            messages.pop()
        complete = [trie.apply("r", first_event_id=first, events=events) for first, events in messages if events]
        messages = []
        snapshot = engine.scheduler.snapshot()
        if not all(complete) or not trie.apply("r", first_event_id=snapshot.next_event_id, events=()):
            assert trie.load_snapshot("r", blocks=snapshot.blocks, next_event_id=snapshot.next_event_id)
            num_snapshots += 1
        else:
            num_exact += 1
        assert trie.confirmed_blocks("r") == {block.block_hash for block in snapshot.blocks}
    assert num_snapshots > 10
    assert num_exact > 100
