"""Random step plans that are valid as a series: slots are taken and given back, ids travel with admissions."""

from __future__ import annotations

import random
from collections.abc import Iterator

from pilotfish.common.requests import EngineRequest, TokenSampling
from pilotfish.common.tenants import ANONYMOUS, Tenant
from pilotfish.scheduler.step_plan import AdmittedSequence, BlockReplacement, ExpertOrders, PlannedRow, SlotWrite, StepPlan

INT32_MAX = 2**31 - 1


def random_plans(rng: random.Random, *, num_plans: int, num_slots: int = 12) -> Iterator[StepPlan]:
    """Plans from step 1 on."""
    running: dict[int, str] = {}
    for step_id in range(1, num_plans + 1):
        released = tuple(slot for slot in list(running) if rng.random() < 0.2)
        for slot in released:
            del running[slot]
        admitted = []
        for slot in range(num_slots):
            if slot not in running and rng.random() < 0.3:
                running[slot] = f"step-{step_id}-é-{slot}"
                admitted.append(_random_admission(rng, slot, running[slot]))
        rows = [_random_row(rng, slot, request_id) for slot, request_id in running.items() if rng.random() < 0.9]
        rng.shuffle(rows)
        replaced = [BlockReplacement(rng.randrange(num_slots), rng.randrange(99), rng.randrange(INT32_MAX))] * rng.randrange(3)
        rank_tokens = tuple(rng.randint(1, 9000) for _ in range(rng.choice((0, 0, 2, 5))))
        orders = _random_orders(rng) if rng.random() < 0.3 else None
        yield StepPlan(
            step_id, tuple(admitted), tuple(rows), released, tuple(replaced), orders, rank_tokens, rng.random() < 0.5
        )


def _random_orders(rng: random.Random) -> ExpertOrders:
    writes = tuple(SlotWrite(rng.randrange(300), rng.randrange(300)) for _ in range(rng.choice((0, 1, 7))))
    return ExpertOrders(rng.random() < 0.5, rng.randrange(60), writes)


def _ids(rng: random.Random, max_count: int) -> tuple[int, ...]:
    return tuple(rng.choice((rng.randrange(100), INT32_MAX)) for _ in range(rng.randint(0, max_count)))


def _random_row(rng: random.Random, slot: int, request_id: str) -> PlannedRow:
    blocks = _ids(rng, 4) if rng.random() < 0.3 else ()
    return PlannedRow(
        request_id, slot, rng.randrange(10**6), rng.randint(1, 9000), rng.random() < 0.7, blocks, rng.randrange(9)
    )


def _random_admission(rng: random.Random, slot: int, request_id: str) -> AdmittedSequence:
    prompt, outputs = (rng.randrange(INT32_MAX), *_ids(rng, 40)), _ids(rng, 5)
    request = EngineRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        sampling=_random_sampling(rng),
        output_token_ids=outputs[: rng.randint(0, len(outputs))],
        priority=rng.choice((0, -3, 2**31)),
        deadline_ms=rng.choice((None, 0.0, rng.random() * 1e4)),
        salt=rng.randbytes(rng.choice((0, 16))),
        tenant=rng.choice((ANONYMOUS, Tenant("acme", 2.5))),
    )
    return AdmittedSequence(request, slot, prompt + outputs, _ids(rng, 6), rng.randrange(99), len(outputs))


def _random_sampling(rng: random.Random) -> TokenSampling:
    return TokenSampling(
        temperature=rng.random(),
        top_p=rng.random(),
        top_k=rng.choice((0, 50, INT32_MAX)),
        min_p=rng.random(),
        repetition_penalty=rng.random(),
        presence_penalty=rng.uniform(-2, 2),
        frequency_penalty=rng.uniform(-2, 2),
        logit_bias={token: rng.uniform(-100, 100) for token in _ids(rng, 4)},
        bad_words_ids=tuple(_ids(rng, 3) for _ in range(rng.randrange(4))),
        end_token_ids=_ids(rng, 3),
        min_tokens=rng.randrange(99),
        max_tokens=rng.choice((1, INT32_MAX)),
        seed=rng.choice((0, -(2**63), 2**63 - 1)),
        logprobs=rng.choice((None, 0, 20)),
    )
