"""Routing by estimated cost: affinity against load, bursts, ties, the ledger."""

from __future__ import annotations

import pytest
from pilotfish.common.errors import Unavailable
from pilotfish.common.hashing import block_hashes, root_hash
from pilotfish.common.requests import BlockStored
from pilotfish.scheduler.router import Candidate, Router, RouterConfig, choose
from pilotfish.scheduler.step_times import StepTime

SIZE = 16
TIME = StepTime.line(10.0, 0.1)


def hashes_of(tokens):
    return block_hashes(tokens, SIZE, parent=root_hash())


def make_router(num_replicas=2, **config):
    router = Router(RouterConfig(block_size=SIZE, **config))
    for number in range(num_replicas):
        router.add_replica(f"r{number}")
    return router


def route(router, request_id, tokens, *, tick=0, output=100, **kwargs):
    return router.route(
        request_id, hashes=hashes_of(tokens), num_tokens=len(tokens), expected_output_tokens=output, tick=tick, **kwargs
    )


def candidate(replica, **fields):
    return Candidate(replica=replica, step_time=fields.pop("step_time", TIME), **fields)


def test_the_cost_is_the_formula():
    choice = choose(
        [candidate("r", matched_tokens=300, queued_tokens=500, num_active=4, tier_load_ms=7.0)],
        num_tokens=1000,
        expected_output_tokens=200,
        work_weight=0.5,
        decode_weight=2.0,
    )
    (score,) = choice.scores
    assert score.queue_ms == pytest.approx(50)
    assert score.prefill_ms == pytest.approx(70)
    assert score.work_ms == pytest.approx(35)
    assert score.decode_ms == pytest.approx(2 * 200 * (10 + 0.1 * 5))
    assert score.cost_ms == pytest.approx(50 + 70 + 35 + 7 + score.decode_ms)


def test_the_choice_says_why():
    choice = choose([candidate("a"), candidate("b", matched_tokens=64)], num_tokens=100, expected_output_tokens=1)
    assert choice.replica == "b"
    assert [score.replica for score in choice.scores] == ["a", "b"]
    assert choice.scores[1].matched_tokens == 64


def test_no_candidate_is_unavailable():
    with pytest.raises(Unavailable, match="no replica"):
        choose([], num_tokens=1, expected_output_tokens=1)


@pytest.mark.parametrize(("queued", "expected"), [(0, "cached"), (1000, "cached"), (3000, "idle")])
def test_prefix_affinity_against_load(queued, expected):
    """1,000 cached tokens are worth a queue of at most their own time and work, and no more."""
    candidates = [candidate("idle"), candidate("cached", matched_tokens=1000, queued_tokens=queued)]
    assert choose(candidates, num_tokens=1100, expected_output_tokens=100).replica == expected


def test_a_popular_prefix_is_computed_again_where_a_new_one_waits():
    """Both have 1,000 tokens ready, or under way, behind a queue of 2,000; of the first, others make use now."""
    busy = {"matched_tokens": 1000, "queued_tokens": 2000}
    for shared_tokens, expected in ((1000, "idle"), (0, "busy")):
        candidates = [
            candidate("idle", shared_tokens=shared_tokens),
            candidate("busy", shared_tokens=shared_tokens, **busy),
        ]
        choice = choose(candidates, num_tokens=1001, expected_output_tokens=1, work_weight=2.0)
        assert choice.replica == expected


def test_decoding_load_counts():
    candidates = [candidate("busy", num_active=50), candidate("idle", num_active=0)]
    assert choose(candidates, num_tokens=10, expected_output_tokens=100).replica == "idle"


def test_a_slower_replica_gets_less():
    candidates = [candidate("slow", step_time=StepTime.line(20.0, 0.2)), candidate("fast", queued_tokens=100)]
    assert choose(candidates, num_tokens=1000, expected_output_tokens=100).replica == "fast"


def test_loading_from_a_tier_is_charged():
    candidates = [candidate("disk", matched_tokens=900, tier_load_ms=500.0), candidate("cold")]
    assert choose(candidates, num_tokens=1000, expected_output_tokens=1).replica == "cold"


def test_ties_go_to_the_one_chosen_longest_ago_then_to_the_first():
    assert choose([candidate("a"), candidate("b")], num_tokens=9, expected_output_tokens=1).replica == "a"
    candidates = [candidate("a", last_chosen=3), candidate("b", last_chosen=2), candidate("c", last_chosen=2)]
    assert choose(candidates, num_tokens=9, expected_output_tokens=1).replica == "b"


def test_costs_within_the_tie_are_equal():
    candidates = [candidate("a", queued_tokens=5, num_active=1), candidate("b", num_active=1, last_chosen=1)]
    assert choose(candidates, num_tokens=9, expected_output_tokens=1, tie_ms=1.0).replica == "a"
    assert choose(candidates, num_tokens=9, expected_output_tokens=1, tie_ms=0.1).replica == "b"


def test_a_new_prompt_goes_to_an_idle_replica_that_costs_little_more():
    def chosen(num_tokens: int, **weights: float) -> str:
        """Two have the prefix that all prompts share; one, just started, has nothing."""
        serving = [candidate(name, matched_tokens=40, num_active=9) for name in "ab"]
        return choose([*serving, candidate("new")], num_tokens=num_tokens, expected_output_tokens=0, **weights).replica

    assert chosen(100, idle_ms=10.0) == "new"
    assert chosen(100, idle_ms=0.5, tie_ms=0.5) == "a"
    assert chosen(60, idle_ms=10.0) == "a", "a conversation that goes on stays"


def test_cold_prompts_alternate_over_idle_replicas():
    router = make_router(3)
    chosen = []
    for number in range(6):
        chosen.append(route(router, f"q{number}", [number] * 40).replica)
        router.finish(f"q{number}")
    assert chosen == ["r0", "r1", "r2"] * 2


def test_the_same_calls_choose_the_same():
    def run():
        router = make_router(3)
        return [route(router, f"q{n}", [n % 4] * 200, tick=n).replica for n in range(40)]

    assert run() == run()


def test_a_burst_with_one_prefix_lands_together():
    """Before any event has come back, the speculative entries keep the burst where its prefix is computed."""
    router = make_router(4)
    prefix = list(range(1600))
    chosen = {route(router, f"q{n}", [*prefix, n]).replica for n in range(8)}
    assert len(chosen) == 1


def test_a_prefix_counts_as_shared_once_it_is_cached_and_while_it_is_used():
    router = make_router(2)
    prefix = list(range(1600))
    route(router, "q0", [*prefix, 0], candidates=["r0"])
    new = route(router, "q1", [*prefix, 1]).scores[1]
    assert new.work_ms == pytest.approx(2 * new.prefill_ms)
    router.trie.apply("r0", first_event_id=1, events=tuple(BlockStored(block, b"") for block in hashes_of(prefix)))
    used = route(router, "q2", [*prefix, 2]).scores[1]
    assert used.work_ms < 0.01 * used.prefill_ms
    for request_id in ("q0", "q1", "q2"):
        router.finish(request_id)
    unused = route(router, "q3", [*prefix, 3]).scores[1]
    assert unused.work_ms == pytest.approx(2 * unused.prefill_ms)


def test_a_burst_too_large_for_one_replica_spreads():
    router = make_router(2)
    prefix = list(range(320))
    chosen = [route(router, f"q{n}", [*prefix, *([n] * 64)]).replica for n in range(40)]
    assert set(chosen) == {"r0", "r1"}


def test_different_prompts_spread():
    router = make_router(2)
    chosen = [route(router, f"q{n}", [n] * 500).replica for n in range(10)]
    assert chosen.count("r0") == chosen.count("r1") == 5


def test_events_decide_when_speculation_has_lapsed():
    router = make_router(2, speculative_ticks=10)
    tokens = list(range(1601))
    first = route(router, "q0", tokens).replica
    router.finish("q0")
    other = "r1" if first == "r0" else "r0"
    events = tuple(BlockStored(block_hash, b"") for block_hash in hashes_of(tokens))
    router.trie.apply(other, first_event_id=1, events=events)
    choice = route(router, "q1", tokens, tick=20)
    assert choice.replica == other
    assert {score.replica: score.matched_tokens for score in choice.scores} == {first: 0, other: 1600}


def test_a_whole_cached_prompt_still_costs_a_token():
    router = make_router(1)
    tokens = list(range(64))
    route(router, "q0", tokens)
    assert route(router, "q1", tokens).scores[0].matched_tokens == 63


def test_the_ledger_counts_queued_tokens_until_the_first_token_and_requests_until_their_end():
    router = make_router(1)
    route(router, "q0", [1] * 100)
    route(router, "q1", [2] * 50)
    assert (router.queued_tokens("r0"), router.num_active("r0")) == (150, 2)
    router.first_token("q0")
    router.first_token("q0")
    assert (router.queued_tokens("r0"), router.num_active("r0")) == (50, 2)
    router.finish("q1")
    router.finish("q1")
    router.finish("nobody")
    assert (router.queued_tokens("r0"), router.num_active("r0")) == (0, 1)


def test_a_request_routed_again_is_counted_once():
    router = make_router(2)
    route(router, "q0", [1] * 100, candidates=["r0"])
    route(router, "q0", [1] * 120, candidates=["r1"])
    assert (router.queued_tokens("r0"), router.num_active("r0")) == (0, 0)
    assert (router.queued_tokens("r1"), router.num_active("r1")) == (120, 1)


def test_only_candidates_are_chosen():
    router = make_router(3)
    tokens = list(range(500))
    route(router, "q0", tokens, candidates=["r2"])
    assert route(router, "q1", tokens).replica == "r2"
    assert route(router, "q2", tokens, candidates=["r0", "r1"]).replica == "r0"
    with pytest.raises(Unavailable):
        route(router, "q3", tokens, candidates=[])


def test_a_lost_replica_takes_its_requests_with_it():
    router = make_router(2)
    route(router, "q0", [1] * 100, candidates=["r0"])
    router.remove_replica("r0")
    router.first_token("q0")
    router.finish("q0")
    assert route(router, "q1", [1] * 100).replica == "r1"
    router.add_replica("r0")
    assert (router.queued_tokens("r0"), router.num_active("r0")) == (0, 0)
