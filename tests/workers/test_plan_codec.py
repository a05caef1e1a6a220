"""Plans as bytes: nothing is lost, and what is not the next plan is refused by name."""

from __future__ import annotations

import dataclasses
import random
import struct

import pytest
from pilotfish.common.requests import EngineRequest, TokenSampling
from pilotfish.scheduler.step_plan import PlannedRow, StepPlan, StepResult
from pilotfish.scheduler.step_scheduler import SchedulerConfig, StepScheduler
from pilotfish.workers.plan_codec import PlanDecoder, PlanMessageError, encode_plan
from random_plans import random_plans


@pytest.mark.parametrize("seed", range(40))
def test_random_plans_survive(seed: int) -> None:
    decoder = PlanDecoder(epoch=5)
    for plan in random_plans(random.Random(seed), num_plans=20):
        message = encode_plan(plan, epoch=5)
        decoded = decoder.decode(memoryview(message) if seed % 2 else message)
        assert decoded == plan
        assert all(type(row) is PlannedRow and type(row.samples) is bool for row in decoded.rows)


def test_every_field_of_an_admission_varies() -> None:
    """A field that is added to the values and not to the codec is noticed here."""
    requests = [a.request for plan in random_plans(random.Random(0), num_plans=50) for a in plan.admitted]
    for values, owner in ((requests, EngineRequest), ([request.sampling for request in requests], TokenSampling)):
        for field in dataclasses.fields(owner):
            assert len({repr(getattr(value, field.name)) for value in values}) > 1, field.name


def test_the_plans_of_a_scheduler_survive() -> None:
    """A cache too small for all: preemptions, prefix hits, merged blocks, slots taken again in the step that frees them."""
    rng = random.Random(3)
    scheduler = StepScheduler(
        SchedulerConfig(num_blocks=14, block_size=4, max_num_seqs=6, max_num_batched_tokens=16, max_model_len=80)
    )
    for number in range(30):
        prompt = tuple([number % 3] * rng.randint(1, 12))
        sampling = TokenSampling(temperature=0.0, max_tokens=rng.randint(1, 30), seed=number)
        scheduler.add(EngineRequest(request_id=f"r{number}", prompt_token_ids=prompt, sampling=sampling))
    decoder = PlanDecoder(epoch=1)
    seen = {"replaced": 0, "released": 0, "hits": 0, "resumed": 0}
    while (plan := scheduler.plan()) is not None:
        assert decoder.decode(encode_plan(plan, epoch=1)) == plan
        seen["replaced"] += len(plan.replaced_blocks)
        seen["released"] += len(plan.released_slots)
        seen["hits"] += sum(bool(a.num_computed) for a in plan.admitted)
        seen["resumed"] += sum(bool(a.num_output) for a in plan.admitted)
        num_sampled = sum(row.samples for row in plan.rows)
        scheduler.update(StepResult(plan.step_id, (7,) * num_sampled, (None,) * num_sampled))
    assert all(seen.values()), seen


def test_a_decode_step_is_small() -> None:
    rows = tuple(PlannedRow(f"a-long-request-id-{slot}", slot, 1000, 1, True, (), 9) for slot in range(256))
    assert len(encode_plan(StepPlan(1, (), rows, ()), epoch=1)) < 256 * 22


def _plans(seed: int, num_plans: int) -> list[bytes]:
    return [encode_plan(plan, epoch=2) for plan in random_plans(random.Random(seed), num_plans=num_plans)]


def test_a_cut_message_is_refused_wherever_it_is_cut() -> None:
    (message,) = _plans(1, 1)
    for length in range(len(message)):
        with pytest.raises(PlanMessageError, match=r"bytes"):
            PlanDecoder(epoch=2).decode(message[:length])
        # And where the header agrees with the cut, its columns do not.
        if length >= 32:
            with pytest.raises(PlanMessageError, match="damaged"):
                PlanDecoder(epoch=2).decode(message[:8] + struct.pack("<Q", length) + message[16:length])
    with pytest.raises(PlanMessageError, match="bytes"):
        PlanDecoder(epoch=2).decode(message + b"\0")


@pytest.mark.parametrize("seed", range(10))
def test_damage_raises_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    (message,) = _plans(seed, 1)
    for _ in range(400):
        damaged = bytearray(message)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        try:
            PlanDecoder(epoch=2).decode(damaged)
        except PlanMessageError:
            continue


def test_what_is_not_the_next_plan_is_refused() -> None:
    first, second, third = _plans(4, 3)
    with pytest.raises(PlanMessageError, match=r"epoch 2.*belongs to epoch 3"):
        PlanDecoder(epoch=3).decode(first)
    with pytest.raises(PlanMessageError, match="not a step plan"):
        PlanDecoder(epoch=2).decode(b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n")
    with pytest.raises(PlanMessageError, match="version 9"):
        PlanDecoder(epoch=2).decode(first[:4] + b"\x09\0" + first[6:])
    decoder = PlanDecoder(epoch=2)
    decoder.decode(first)
    with pytest.raises(PlanMessageError, match="step 3 came after that of step 1"):
        decoder.decode(third)
    with pytest.raises(PlanMessageError, match="step 1 came after that of step 1"):
        decoder.decode(first)
    decoder.decode(second)


def test_a_rank_that_missed_an_admission_says_so() -> None:
    row = PlannedRow("a", 4, 0, 1, True, (), 0)
    with pytest.raises(PlanMessageError, match="slot 4 has a row"):
        PlanDecoder(epoch=1).decode(encode_plan(StepPlan(8, (), (row,), ()), epoch=1))


def test_values_beyond_their_columns_are_not_cut() -> None:
    row = PlannedRow("a", 4, 2**32, 1, True, (), 0)
    with pytest.raises(struct.error):
        encode_plan(StepPlan(1, (), (row,), ()), epoch=1)
