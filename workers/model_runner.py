"""Runs step plans on the device: applies a plan's changes to the batch state, runs the model, draws tokens.

A step has two halves. `launch` applies the plan and queues all its work; on a GPU it returns before that work is done, so
that the next plan can be made and launched meanwhile. `PendingStep.result` waits for the tokens. Plans are launched in the
order of their ids and their results are taken in the same order.

On a GPU most steps replay a CUDA graph: those in which every row computes one token and samples (decode_graphs.py), and those
with prompt tokens in them (chunk_graphs.py). Of several data ranks all replay one of the same kind and size, or none replays
any; one without rows computes a token of padding beside the others.

A step that raises is run again in halves: running the same rows twice writes the same keys and values and draws the same
tokens. Rows that fail alone are reported as errors, all others get their tokens; a step that was too large for
the memory left succeeds in smaller parts.

Shape letters: R rows that sample, V vocabulary, H hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite

import numpy as np
import torch

from ..common import logs
from ..common.config import EngineConfig
from ..common.requests import ExpertBalance, TokenLogprob
from ..models.causal_lm import CausalLM
from ..scheduler.step_plan import AdmittedSequence, ExpertOrders, PlannedRow, StepPlan, StepResult
from .batch_state import BatchState, SamplingRows
from .chunk_graphs import ChunkGraph, ChunkGraphs, ChunkStep, record_chunk_graphs
from .comm import RankGroup
from .cuda_graphs import GraphRecorder, uses_graphs
from .decode_graphs import DecodeGraph, DecodeGraphs, DecodeStep, record_decode_graphs
from .expert_mover import ExpertMover
from .kv_cache import KvCache
from .sampler import Sampled, Sampler
from .side_copies import SideCopies
from .stopwatch import Stopwatch

logger = logging.getLogger(__name__)

_NO_TOKEN = "the model's logits are not finite, or logit_bias, bad_words and min_tokens leave no token to draw"
_NOTHING_DRAWN = (0, None)


@dataclass(frozen=True, slots=True)
class PendingPart:
    """The rows of one forward pass and what they sampled (on its way to the host); `error` where they could not run."""

    rows: Sequence[PlannedRow]
    sampled: Sampled | None = None
    error: str = ""

    def collect(self, drawn: dict[str, tuple[int, TokenLogprob | None]], errors: dict[str, str]) -> None:
        """Adds the rows' tokens and errors, by request id. The copies to the host must have arrived."""
        if self.error:
            errors.update((row.request_id, self.error) for row in self.rows)
        if self.sampled is None:
            return
        request_ids = [row.request_id for row in self.rows if row.samples]
        num_rows = len(request_ids)
        token_ids, logits_R = self.sampled.tokens_R[:num_rows].tolist(), self.sampled.logits_R[:num_rows].tolist()
        logprobs = self.sampled.logprobs.entries(token_ids) if self.sampled.logprobs else [None] * len(token_ids)
        drawn.update(zip(request_ids, zip(token_ids, logprobs, strict=True), strict=True))
        errors.update((name, _NO_TOKEN) for name, logit in zip(request_ids, logits_R, strict=True) if not isfinite(logit))


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A launched step.

    Attributes:
        arrived: the GPU's mark behind its last copy to the host; None on a CPU.
        expert_loads: int64 [layers, experts] on their way to the host, where the plan's orders ask for them.
    """

    plan: StepPlan
    parts: Sequence[PendingPart]
    stopwatch: Stopwatch
    arrived: torch.cuda.Event | None
    group: RankGroup | None = None
    expert_loads: torch.Tensor | None = None

    @property
    def has_arrived(self) -> bool:
        return self.arrived is None or self.arrived.query()

    def result(self) -> StepResult:
        """Waits for the step's work; one token for each row that samples, in the order of the plan.

        Raises:
            InternalError: another rank took no part in it.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        if self.group is not None:
            self.group.check()
        drawn: dict[str, tuple[int, TokenLogprob | None]] = {}
        errors: dict[str, str] = {}
        for part in self.parts:
            part.collect(drawn, errors)
        sampled = [drawn.get(row.request_id, _NOTHING_DRAWN) for row in self.plan.rows if row.samples]
        token_ids, logprobs = zip(*sampled, strict=True) if sampled else ((), ())
        return StepResult(self.plan.step_id, token_ids, logprobs, errors)

    def spent_ms(self) -> Mapping[str, float]:
        """Milliseconds by part of the step. On a GPU its work must be complete."""
        return self.stopwatch.total_ms()


class ModelRunner:
    """A model with its cache and the device state of its running sequences. `experts`: where they may move, between ranks."""

    failure = ""  # what it launches ends
    expert_balance: ExpertBalance | None = None  # the leader of ranks knows it
    agreement = None  # it asks nobody

    def __init__(
        self,
        model: CausalLM,
        *,
        config: EngineConfig,
        kv_cache: KvCache,
        max_model_len: int,
        device: torch.device,
        group: RankGroup | None = None,
        experts: ExpertMover | None = None,
    ) -> None:
        self.model = model
        self.experts = experts
        self._kv_cache = kv_cache
        self._device = device
        self._batch_state = BatchState(
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            block_size=config.block_size,
            num_blocks=kv_cache.num_blocks,
            device=device,
            fixed_rows=uses_graphs(config, device),
        )
        self._sampler = Sampler(self._batch_state, vocab=model.vocab, group=group)
        self._copies = SideCopies(device)
        self._group = group
        self._isolates_failures = group is None  # what fails on one rank alone cannot run again on all
        self._decode_graphs, self._chunk_graphs = DecodeGraphs({}), ChunkGraphs({})
        # Slots whose sequence could not be admitted: their rows never run, since their block tables are not theirs.
        self._unusable_slots: dict[int, str] = {}

    @torch.inference_mode()
    def use_graphs(self, decode_sizes: Sequence[int], chunk_sizes: Sequence[int], *, recorder: GraphRecorder) -> None:
        """Decode steps of up to the largest size, and steps of about one of `chunk_sizes` tokens, replay what is recorded."""
        self._chunk_graphs = record_chunk_graphs([self._chunk_step(size) for size in self._that_fit(chunk_sizes)], recorder)
        self._decode_graphs = record_decode_graphs([self._decode_step(size) for size in decode_sizes], recorder)

    @torch.inference_mode()
    def rehearse(self, decode_sizes: Sequence[int], chunk_sizes: Sequence[int]) -> None:
        """Runs once what `use_graphs` would record."""
        for size in self._that_fit(chunk_sizes):
            self._chunk_step(size).forward()
        for size in decode_sizes:
            step = self._decode_step(size)
            step.draw(*step.forward())

    def _that_fit(self, chunk_sizes: Sequence[int]) -> list[int]:
        return [size for size in chunk_sizes if size <= self._batch_state.most_tokens]

    def _chunk_step(self, size: int) -> ChunkStep:
        return ChunkStep(size, model=self.model, batch_state=self._batch_state, kv_cache=self._kv_cache)

    def _decode_step(self, size: int) -> DecodeStep:
        state, cache = self._batch_state, self._kv_cache
        return DecodeStep(size, model=self.model, batch_state=state, sampler=self._sampler, kv_cache=cache)

    def close(self) -> None:
        """Frees the graphs. A group that is aborted waits for those that hold its collectives."""
        self._decode_graphs, self._chunk_graphs = DecodeGraphs({}), ChunkGraphs({})

    def run(self, plan: StepPlan) -> StepResult:
        """Launches the step and waits for it."""
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: StepPlan, *, isolate_failures: bool = True) -> PendingStep:
        """Applies the plan and queues its work. Without `isolate_failures`, or with ranks, the first exception is raised.

        Raises:
            torch.AcceleratorError: the device is lost.
        """
        isolate_failures &= self._isolates_failures
        expert_loads = self._follow_orders(plan.experts) if plan.experts is not None else None
        for slot in plan.released_slots:
            self._sampler.release(slot)
        for sequence in plan.admitted:
            self._admit(sequence, isolate_failures=isolate_failures)
        rows, parts = plan.rows, []
        if self._unusable_slots:
            rows = tuple(row for row in plan.rows if row.slot not in self._unusable_slots)
            unusable = (row for row in plan.rows if row.slot in self._unusable_slots)
            parts = [PendingPart([row], error=self._unusable_slots[row.slot]) for row in unusable]
        stopwatch = Stopwatch(self._device)
        launch_rows = self._launch_isolating if isolate_failures else self._launch_whole
        parts += launch_rows(rows, plan, stopwatch)
        return PendingStep(plan, parts, stopwatch, self._copies.mark(), self._group, expert_loads)

    def _follow_orders(self, orders: ExpertOrders) -> torch.Tensor | None:
        assert self.experts is not None, "orders to experts that cannot move"
        loads_LE = self.experts.follow(orders)
        return None if loads_LE is None else self._to_host(loads_LE)

    def _admit(self, sequence: AdmittedSequence, *, isolate_failures: bool) -> None:
        self._unusable_slots.pop(sequence.slot, None)
        try:
            self._batch_state.admit(sequence)
            self._sampler.admit(sequence)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if not isolate_failures:
                raise
            request_id = sequence.request.request_id
            logger.exception("request %s cannot be admitted", request_id, extra=logs.about(request_id))
            self._unusable_slots[sequence.slot] = _describe(error)

    def _launch_isolating(self, rows: Sequence[PlannedRow], plan: StepPlan, stopwatch: Stopwatch) -> list[PendingPart]:
        try:
            return self._launch_whole(rows, plan, stopwatch)
        except torch.AcceleratorError:
            raise  # no smaller step can succeed
        except Exception as error:
            if len(rows) <= 1:
                request_id = rows[0].request_id
                logger.exception("the step of request %s failed", request_id, extra=logs.about(request_id))
                return [PendingPart(rows, error=_describe(error))]
            logger.exception("a step of %d rows failed and runs again in halves", len(rows))
        # Outside the handler, where the failed pass's tensors are no longer held by its traceback.
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        middle = len(rows) // 2
        return self._launch_isolating(rows[:middle], plan, stopwatch) + self._launch_isolating(rows[middle:], plan, stopwatch)

    def _launch_whole(self, rows: Sequence[PlannedRow], plan: StepPlan, stopwatch: Stopwatch) -> list[PendingPart]:
        decode, chunk = self._find_graphs(rows, plan)
        # The columns of a decode graph bring the rows' new blocks.
        self._batch_state.update_blocks(plan.replaced_blocks, () if decode is not None else rows)
        if not rows:
            if plan.rank_tokens:
                self._compute_padding(decode, chunk, plan.rank_tokens, stopwatch)
            return []
        if decode is not None:
            return [PendingPart(rows, self._replay_decode(decode, rows, stopwatch))]
        if chunk is not None:
            sampled = self._replay_chunk(chunk, rows, stopwatch)
        else:
            sampled = self._run(rows, plan.rank_tokens, stopwatch)
        return [PendingPart(rows, sampled.map(self._to_host) if sampled is not None else None)]

    def _find_graphs(self, rows: Sequence[PlannedRow], plan: StepPlan) -> tuple[DecodeGraph | None, ChunkGraph | None]:
        """What serves the step, at most one of them. All data ranks find a graph of one kind and size, or none does."""
        most = max(plan.rank_tokens, default=0)
        decode = self._decode_graphs.find(rows, num_rows=most) if plan.all_decode or not plan.rank_tokens else None
        return decode, None if decode is not None else self._chunk_graphs.find(rows, num_tokens=most)

    def _compute_padding(
        self, decode: DecodeGraph | None, chunk: ChunkGraph | None, rank_tokens: tuple[int, ...], stopwatch: Stopwatch
    ) -> None:
        """This rank's experts serve the tokens of the others."""
        state = self._batch_state
        if decode is not None:
            self._replay_forward(decode, state.decode_columns((), decode.columns.shape[1]), stopwatch)
            return
        with stopwatch.measure("forward"):
            if chunk is not None:
                state.fill(chunk.step.columns, state.step_columns((), chunk.step.shape)[0])
                chunk.forward.replay()
            else:
                self.model.forward(replace(self._batch_state.compose_padding(self._kv_cache), rank_tokens=rank_tokens))

    def _run(self, rows: Sequence[PlannedRow], rank_tokens: tuple[int, ...], stopwatch: Stopwatch) -> Sampled | None:
        batch, sampling = self._batch_state.compose(rows, self._kv_cache)
        if rank_tokens:
            batch = replace(batch, rank_tokens=rank_tokens)
        with stopwatch.measure("forward"):
            hidden_RH = self.model.forward(batch)
        return self._draw(hidden_RH, sampling, stopwatch)

    def _replay_chunk(self, graph: ChunkGraph, rows: Sequence[PlannedRow], stopwatch: Stopwatch) -> Sampled | None:
        step = graph.step
        columns, slots_R = self._batch_state.step_columns(rows, step.shape)
        self._batch_state.fill(step.columns, columns)
        with stopwatch.measure("forward"):
            graph.forward.replay()
        num_sampling = len(slots_R)
        sampling = SamplingRows(slots_R, step.draw_rows.first(num_sampling))
        return self._draw(graph.hidden_RH[:num_sampling], sampling, stopwatch)

    def _draw(self, hidden_RH: torch.Tensor, sampling: SamplingRows, stopwatch: Stopwatch) -> Sampled | None:
        if not len(sampling.host_slots_R):
            return None
        with stopwatch.measure("sample"):
            self._sampler.upload()
            own = self.model.race_own(hidden_RH, self._sampler.race_rows(sampling.on_device))
            if self._sampler.is_simple(sampling.host_slots_R):
                return self._sampler.draw_simple(own, sampling.on_device)
            return self._sampler.draw(self.model.gather_logits(own.logits_SV), sampling)

    def _replay_decode(self, graph: DecodeGraph, rows: Sequence[PlannedRow], stopwatch: Stopwatch) -> Sampled:
        """What was sampled, on its way to the host."""
        columns = self._batch_state.decode_columns(rows, graph.columns.shape[1])
        slots_R = columns[0, : len(rows)]
        self._sampler.upload()
        computed = self._replay_forward(graph, columns, stopwatch)
        if self._sampler.is_simple(slots_R):
            with stopwatch.measure("sample", since=computed) as drawn:
                self._copies.wait_until_left()
                graph.draw.replay()
            return graph.sampled.map(partial(self._copies.to_host, event=drawn))
        with stopwatch.measure("sample", since=computed):
            sampling = SamplingRows(slots_R, graph.rows.first(len(rows)))
            sampled = self._sampler.draw(self.model.gather_logits(graph.own_logits_SV[: len(rows)]), sampling)
        return sampled.map(self._to_host)

    def _replay_forward(self, graph: DecodeGraph, columns: np.ndarray, stopwatch: Stopwatch) -> torch.cuda.Event | None:
        """What is recorded behind it, on a GPU."""
        self._copies.fill(graph.columns, columns)
        with stopwatch.measure("forward") as computed:
            graph.forward.replay()
        self._copies.was_read(computed)
        return computed

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Queues a copy to the host, behind the work that makes the tensor and before what comes next."""
        if self._device.type == "cpu":
            return tensor.clone()
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
