"""A runner that obeys plans as the real one must, over a pseudo-model whose every token depends on all the pages it reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import pytest
from pilotfish.common.requests import EngineRequest, FinishReason, SequenceOutput, TokenSampling
from pilotfish.scheduler.step_plan import StepPlan, StepResult
from pilotfish.scheduler.step_scheduler import SchedulerConfig, StepScheduler

VOCABULARY = 64


def _cell(previous: int, token: int) -> int:
    """What the cache holds for a position: it depends on the token and on everything before it."""
    return hash((previous, token, 7919))


def _next_token(cells: Sequence[int]) -> int:
    return hash(tuple(cells)) % VOCABULARY


def make_request(request_id: str, prompt: Sequence[int], *, max_tokens: int = 8, **fields) -> EngineRequest:
    sampling = TokenSampling(
        temperature=0.0,
        max_tokens=max_tokens,
        seed=0,
        min_tokens=fields.pop("min_tokens", 0),
        end_token_ids=tuple(fields.pop("end_token_ids", ())),
    )
    return EngineRequest(request_id=request_id, prompt_token_ids=tuple(prompt), sampling=sampling, **fields)


def expected_output(request: EngineRequest, config: SchedulerConfig) -> tuple[list[int], FinishReason]:
    """What one sequence alone produces: the naive model of the whole scheduler."""
    tokens: list[int] = []
    cells: list[int] = []
    for token in request.prompt_token_ids:
        cells.append(_cell(cells[-1] if cells else 0, token))
    sampling = request.sampling
    limit = min(sampling.max_tokens, config.max_model_len - len(request.prompt_token_ids))
    while True:
        if len(cells) > config.num_blocks * config.block_size:
            return tokens, FinishReason.ERROR
        tokens.append(_next_token(cells))
        if len(tokens) > sampling.min_tokens and tokens[-1] in sampling.end_token_ids:
            return tokens, FinishReason.STOP
        if len(tokens) >= limit:
            return tokens, FinishReason.LENGTH
        cells.append(_cell(cells[-1], tokens[-1]))


class PseudoRunner:
    """Batch state by slot and cache pages by block id, changed by plans alone, as on a device."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pages = [[None] * config.block_size for _ in range(config.num_blocks + 1)]
        self.tokens: list[list[int] | None] = [None] * config.max_num_seqs
        self.tables: list[list[int]] = [[] for _ in range(config.max_num_seqs)]
        self.used_in_flight: deque[dict[int, str]] = deque()

    def run(self, plan: StepPlan) -> StepResult:
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        for slot in plan.released_slots:
            assert self.tokens[slot] is not None, "a slot is released twice"
            self.tokens[slot], self.tables[slot] = None, []
        for admitted in plan.admitted:
            assert self.tokens[admitted.slot] is None, "a slot is taken before it is released"
            self.tokens[admitted.slot] = list(admitted.token_ids)
            self.tables[admitted.slot] = list(admitted.block_ids)
            known = (*admitted.request.prompt_token_ids, *admitted.request.output_token_ids)
            assert admitted.token_ids[: len(known)] == known
            assert admitted.num_output == len(admitted.token_ids) - len(admitted.request.prompt_token_ids)
        for replaced in plan.replaced_blocks:
            self.tables[replaced.slot][replaced.index] = replaced.block_id
        used: dict[int, str] = {}
        for row in plan.rows:
            self._check_new_blocks(row)
            self.tables[row.slot] += row.new_block_ids
            num_filled = -(-(row.start + row.num_tokens) // self.config.block_size)
            assert not row.new_block_ids or len(self.tables[row.slot]) == num_filled
            self._compute(row.slot, row.start, row.num_tokens)
            used.update(dict.fromkeys(self.tables[row.slot], row.request_id))
        sampled = [self._sample(row) for row in plan.rows if row.samples]
        self.used_in_flight.append(used)
        return StepResult(plan.step_id, tuple(sampled), (None,) * len(sampled))

    def delivered(self) -> None:
        self.used_in_flight.popleft()

    def _check_new_blocks(self, row) -> None:
        for block_id in row.new_block_ids:
            for used in self.used_in_flight:
                assert used.get(block_id, row.request_id) == row.request_id, "a block in use by a step in flight was given away"

    def _compute(self, slot: int, start: int, num_tokens: int) -> None:
        for position in range(start, start + num_tokens):
            previous = self._cells(slot, position)[-1] if position else 0
            block_id = self.tables[slot][position // self.config.block_size]
            self.pages[block_id][position % self.config.block_size] = _cell(previous, self.tokens[slot][position])

    def _cells(self, slot: int, num_tokens: int) -> list[int]:
        size = self.config.block_size
        table = self.tables[slot][: -(-num_tokens // size)]
        return [cell for block_id in table for cell in self.pages[block_id]][:num_tokens]

    def _sample(self, row) -> int:
        tokens = self.tokens[row.slot]
        assert row.start + row.num_tokens == len(tokens), "a row samples before all known tokens are computed"
        assert len(set(self.tables[row.slot])) == len(self.tables[row.slot])
        cells = self._cells(row.slot, len(tokens))
        assert len(cells) == len(tokens)
        tokens.append(_next_token(cells))
        return tokens[-1]


class Engine:
    """Scheduler and runner with up to `depth` steps in flight, checked after every verb."""

    def __init__(self, *, depth: int = 1, **config) -> None:
        defaults = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 256}
        self.config = SchedulerConfig(**(defaults | config))
        self.scheduler = StepScheduler(self.config)
        self.runner = PseudoRunner(self.config)
        self.depth = depth
        self.results: deque[StepResult] = deque()
        self.plans: list[StepPlan] = []
        self.outputs: dict[str, list[SequenceOutput]] = {}

    def add(self, *args, **fields) -> EngineRequest:
        request = args[0] if isinstance(args[0], EngineRequest) else make_request(*args, **fields)
        self.scheduler.add(request)
        self.collect()
        return request

    def plan(self) -> StepPlan | None:
        plan = self.scheduler.plan()
        self.scheduler.check_invariants()
        if plan is not None:
            self.plans.append(plan)
            self.results.append(self.runner.run(plan))
        self.collect()
        return plan

    def deliver(self, errors: dict[str, str] | None = None) -> None:
        result = self.results.popleft()
        self.scheduler.update(StepResult(result.step_id, result.token_ids, result.logprobs, errors or {}))
        self.runner.delivered()
        self.scheduler.check_invariants()
        self.collect()

    def step(self) -> StepPlan | None:
        """Plan one step, and deliver results until fewer than `depth` are in flight or, without a plan, one."""
        plan = self.plan()
        if plan is None and not self.results:
            assert not self.scheduler.has_work, f"stuck: {self.describe()}"
        if self.results and (plan is None or len(self.results) >= self.depth):
            self.deliver()
        return plan

    def describe(self) -> str:
        lines = self.scheduler._lines
        return f"{self.config} {self.scheduler.load()} " + ", ".join(
            f"{s.request_id}: known {s.num_known}, computed {s.num_computed}, blocks {s.block_ids}, slot {s.slot}"
            for s in [*lines.running, *lines.waiting]
        )

    def run(self, max_steps: int = 10_000) -> None:
        """Until there is nothing to do."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, f"not done after {max_steps} steps"

    def collect(self) -> None:
        for output in self.scheduler.drain_outputs():
            self.outputs.setdefault(output.request_id, []).append(output)

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs.get(request_id, []) for token in output.token_ids]

    def finish_reason(self, request_id: str) -> FinishReason | None:
        outputs = self.outputs.get(request_id, [])
        assert all(output.finish_reason is None for output in outputs[:-1]), "output after the end"
        return outputs[-1].finish_reason if outputs else None

    def rows(self) -> list[list[tuple[str, int, int]]]:
        """(request, start, number of tokens) of the rows of every plan so far."""
        return [[(row.request_id, row.start, row.num_tokens) for row in plan.rows] for plan in self.plans]

    def check_output(self, request: EngineRequest) -> None:
        """The request ended as it does alone, with exactly those tokens at the right offsets."""
        tokens, reason = expected_output(request, self.config)
        known = len(request.output_token_ids)
        assert self.tokens(request.request_id) == tokens[known:]
        assert self.finish_reason(request.request_id) == reason
        offset = known
        for output in self.outputs[request.request_id]:
            assert output.offset == offset
            offset += len(output.token_ids)


@pytest.fixture
def make_engine():
    """The Engine class: call it with SchedulerConfig fields and depth."""
    return Engine


@pytest.fixture
def request_of():
    return make_request


@pytest.fixture
def output_of():
    return expected_output
