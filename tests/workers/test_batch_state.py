"""The gathered batches against a naive model of the same state: lists of tokens and of blocks."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from pilotfish.common.requests import EngineRequest, TokenSampling
from pilotfish.kernels.drawn import SequenceEnds
from pilotfish.scheduler.step_plan import AdmittedSequence, BlockReplacement, PlannedRow
from pilotfish.workers.batch_state import BatchState, DrawRows, StepShape
from pilotfish.workers.kv_cache import KvCache

BLOCK = 16
MAX_LEN = 96
NUM_SLOTS = 8
SAMPLING = TokenSampling(temperature=0.0, max_tokens=1, seed=0)


class Naive:
    """One running sequence, in lists."""

    def __init__(self, slot: int, tokens: list[int], blocks: list[int], num_computed: int) -> None:
        self.slot, self.tokens, self.blocks, self.num_computed = slot, tokens, blocks, num_computed
        self.num_prompt = len(tokens)


def new_state(*, fixed_rows: bool = False) -> BatchState:
    return BatchState(
        max_num_seqs=NUM_SLOTS,
        max_model_len=MAX_LEN,
        block_size=BLOCK,
        num_blocks=500,
        device=torch.device("cpu"),
        fixed_rows=fixed_rows,
    )


def admit(state: BatchState, rng: random.Random, slot: int) -> Naive:
    tokens = [rng.randrange(1000) for _ in range(rng.randint(1, MAX_LEN - 4))]
    num_hit = rng.randint(0, (len(tokens) - 1) // BLOCK)
    sequence = Naive(slot, tokens, [rng.randrange(1, 500) for _ in range(num_hit)], num_hit * BLOCK)
    request = EngineRequest(request_id=str(slot), prompt_token_ids=tuple(tokens), sampling=SAMPLING)
    state.admit(AdmittedSequence(request, slot, tuple(tokens), tuple(sequence.blocks), sequence.num_computed, 0))
    return sequence


def plan_row(sequence: Naive, rng: random.Random) -> PlannedRow:
    """All that is left to compute, or a part of it."""
    left = len(sequence.tokens) - sequence.num_computed
    num_tokens = rng.choice([left, rng.randint(1, left)])
    start = sequence.num_computed
    missing = -(-(start + num_tokens) // BLOCK) - len(sequence.blocks)
    added = tuple(rng.randrange(1, 500) for _ in range(missing))
    sequence.blocks += added
    sequence.num_computed += num_tokens
    samples = sequence.num_computed == len(sequence.tokens)
    output_position = len(sequence.tokens) - sequence.num_prompt
    return PlannedRow(str(sequence.slot), sequence.slot, start, num_tokens, samples, added, output_position)


def append(state: BatchState, rows: DrawRows, tokens: list[int]) -> None:
    SequenceEnds(state.token_ids_MC, rows.slots_R, rows.lengths_R).append(torch.tensor(tokens))


def check(batch, sampled, rows: list[PlannedRow], running: dict[int, Naive], *, num_empty: int) -> None:
    expected = [(running[row.slot], position) for row in rows for position in range(row.start, row.start + row.num_tokens)]
    assert batch.token_ids_T.tolist() == [sequence.tokens[position] for sequence, position in expected]
    assert batch.positions_T.tolist() == [position for _, position in expected]
    slots = [sequence.blocks[position // BLOCK] * BLOCK + position % BLOCK for sequence, position in expected]
    assert batch.slots_T.tolist() == slots
    ends = [row.start + row.num_tokens for row in rows]
    assert batch.context_lens_S.tolist() == ends + [0] * num_empty
    num_tokens = [row.num_tokens for row in rows] + [0] * num_empty
    assert batch.min_query_len <= min(num_tokens)
    assert batch.max_query_len == max(num_tokens)
    starts = [sum(num_tokens[:index]) for index in range(len(num_tokens) + 1)]
    assert batch.query_starts_S1.tolist() == starts
    assert len(batch.block_tables_SB) == len(num_tokens)
    for table, end, row in zip(batch.block_tables_SB.tolist(), ends, rows, strict=False):
        num_blocks = -(-end // BLOCK)
        assert table[:num_blocks] == running[row.slot].blocks[:num_blocks]
    sampling = [index for index, row in enumerate(rows) if row.samples]
    assert batch.logits_rows_R.tolist() == [starts[index + 1] - 1 for index in sampling]
    columns = (sampled.on_device.slots_R, sampled.on_device.output_positions_R, sampled.on_device.lengths_R)
    values = [
        [f(index) for index in sampling] for f in (lambda i: rows[i].slot, lambda i: rows[i].output_position, ends.__getitem__)
    ]
    assert [column.tolist() for column in columns] == values
    assert sampled.host_slots_R.tolist() == values[0]
    dtypes = (batch.token_ids_T, batch.positions_T, batch.slots_T, batch.logits_rows_R)
    assert all(tensor.dtype == torch.int64 for tensor in dtypes)
    dtypes = (batch.block_tables_SB, batch.query_starts_S1, batch.context_lens_S)
    assert all(tensor.dtype == torch.int32 for tensor in dtypes)


@pytest.mark.parametrize("fixed_rows", [False, True], ids=["as they are", "fixed rows"])
def test_random_steps_gather_what_lists_would_hold(fixed_rows):
    rng = random.Random(5)
    state, cache = new_state(fixed_rows=fixed_rows), KvCache((), 500, BLOCK)
    running: dict[int, Naive] = {}
    for _ in range(300):
        for slot in range(NUM_SLOTS):
            if slot not in running and rng.random() < 0.3:
                running[slot] = admit(state, rng, slot)
        chosen = [running[slot] for slot in rng.sample(sorted(running), rng.randint(0, len(running)))]
        chosen = [sequence for sequence in chosen if len(sequence.tokens) > sequence.num_computed]
        if not chosen:
            continue
        replaced = []
        for sequence in chosen:
            if sequence.blocks and rng.random() < 0.3:
                index = rng.randrange(len(sequence.blocks))
                sequence.blocks[index] = rng.randrange(1, 500)
                replaced.append(BlockReplacement(sequence.slot, index, sequence.blocks[index]))
        rows = [plan_row(sequence, rng) for sequence in chosen]
        state.update_blocks(replaced, rows)
        batch, sampled = state.compose(rows, cache)
        check(batch, sampled, rows, running, num_empty=NUM_SLOTS + 1 - len(rows) if fixed_rows else 0)
        tokens = [rng.randrange(1000) for _ in sampled.host_slots_R]
        append(state, sampled.on_device, tokens)
        for slot, token in zip(sampled.host_slots_R.tolist(), tokens, strict=True):
            running[slot].tokens.append(token)
            if len(running[slot].tokens) >= MAX_LEN or rng.random() < 0.1:
                del running[slot]


def test_columns_begin_where_kernels_like_it():
    rng = random.Random(7)
    for _ in range(50):
        sizes = {name: rng.randint(1, 40) for name in ("num_tokens", "num_rows", "num_sampling")}
        shape = StepShape(**sizes, max_blocks=1, max_query_len=1, min_query_len=0)
        assert all(column.start * 8 % 16 == 0 for column in shape.columns)
        assert all(before.stop <= after.start for before, after in pairwise(shape.columns))


def test_decode_steps_bring_their_new_blocks():
    """Padded, in any order, and run twice as a step that failed is."""
    rng = random.Random(6)
    state, cache = new_state(), KvCache((), 500, BLOCK)
    running = {slot: admit(state, rng, slot) for slot in range(NUM_SLOTS)}
    for sequence in running.values():
        row = plan_row(sequence, rng)
        state.update_blocks((), [row])
        sequence.tokens[sequence.num_computed :] = ()
        sequence.num_computed -= 1
    num_grown = 0
    while running:
        rows = [plan_row(running[slot], rng) for slot in rng.sample(sorted(running), rng.randint(1, len(running)))]
        num_grown += sum(bool(row.new_block_ids) for row in rows)
        columns = torch.from_numpy(state.decode_columns(rows, NUM_SLOTS))
        for _ in range(2):
            batch, drawn = state.compose_decode(columns, cache)
        for index, row in enumerate(rows):
            sequence = running[row.slot]
            assert batch.token_ids_T[index] == sequence.tokens[row.start]
            assert batch.slots_T[index] == sequence.blocks[row.start // BLOCK] * BLOCK + row.start % BLOCK
            assert state.block_tables_MB[row.slot].tolist()[: len(sequence.blocks)] == sequence.blocks
            assert batch.block_tables_SB[index].tolist()[: len(sequence.blocks)] == sequence.blocks
        padding = slice(len(rows), None)
        assert not batch.token_ids_T[padding].any()
        assert not batch.block_tables_SB[padding].any()
        tokens = [rng.randrange(1000) for _ in rows]
        append(state, drawn.first(len(rows)), tokens)
        for row, token in zip(rows, tokens, strict=True):
            running[row.slot].tokens.append(token)
            if len(running[row.slot].tokens) > MAX_LEN:
                del running[row.slot]
    assert num_grown > NUM_SLOTS


def test_a_step_without_a_sampling_row_has_empty_columns():
    state = new_state()
    request = EngineRequest(request_id="a", prompt_token_ids=(1, 2, 3), sampling=SAMPLING)
    state.admit(AdmittedSequence(request, 0, (1, 2, 3), (), 0, 0))
    rows = [PlannedRow("a", 0, 0, 2, False, (9,), 0)]
    state.update_blocks((), rows)
    batch, sampled = state.compose(rows, KvCache((), 500, BLOCK))
    assert batch.logits_rows_R.shape == (0,)
    assert sampled.host_slots_R.dtype == np.int64
    assert len(sampled.host_slots_R) == 0
