"""What the step scheduler and the model runner say to each other.

Life cycle: `StepScheduler.plan()` makes a StepPlan, the runner applies it to its persistent batch state and runs it, and
`StepScheduler.update()` takes the StepResult. Plans are applied in the order of their ids and are deltas: what a plan does not
mention stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..common.requests import EngineRequest, TokenLogprob


@dataclass(frozen=True, slots=True)
class AdmittedSequence:
    """A sequence that takes a slot with this plan, new or after a preemption.

    Attributes:
        slot: its row of the batch state, in [0, max_num_seqs).
        token_ids: all its known tokens, prompt and then outputs.
        block_ids: pages of its prefix hit; the rows of the plan bring the others.
        num_computed: tokens whose keys and values these pages hold already.
        num_output: how many of `token_ids` are outputs.
    """

    request: EngineRequest
    slot: int
    token_ids: tuple[int, ...]
    block_ids: tuple[int, ...]
    num_computed: int
    num_output: int


class PlannedRow(NamedTuple):
    """One sequence's share of a step: its tokens at positions [start, start + num_tokens).

    With `samples` the logits of the last of them are sampled, and the token becomes output number `output_position` (from 0).
    `new_block_ids` are appended to the slot's block table before the step, and the last of them holds the row's last token: one
    token has at most one, and is the first in it. A named tuple, because hundreds are made a step.
    """

    request_id: str
    slot: int
    start: int
    num_tokens: int
    samples: bool
    new_block_ids: tuple[int, ...]
    output_position: int


@dataclass(frozen=True, slots=True)
class BlockReplacement:
    """Entry `index` of the slot's block table becomes `block_id`, a page with the same tokens (identical siblings merged)."""

    slot: int
    index: int
    block_id: int


class SlotWrite(NamedTuple):
    """Expert slot `slot` gets the weights that `source` held before the step. Slots count over all ranks of a layer."""

    slot: int
    source: int


@dataclass(frozen=True, slots=True)
class ExpertOrders:
    """What a step does with experts before its rows run, on all ranks (expert_balancer.py makes them).

    Attributes:
        reads_loads: the loads since the last reading are summed over the ranks and brought to the leader.
        layer: whose slots are written, counted among the sparse layers.
        writes: no slot twice. Each reads what was there before all of them.
    """

    reads_loads: bool = False
    layer: int = 0
    writes: tuple[SlotWrite, ...] = ()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: `experts`, `released_slots`, `admitted` and `replaced_blocks` are applied, then `rows` run, in this order.

    `step_id` starts at 1 and grows by one; it is the logical tick of everything in the scheduler.

    Where a replica has several data ranks, their leaders fill in what they have agreed on: `rank_tokens`, the tokens of each
    (one of padding where it has none), and `all_decode`, whether `is_decode` holds on all of them.
    """

    step_id: int
    admitted: tuple[AdmittedSequence, ...]
    rows: tuple[PlannedRow, ...]
    released_slots: tuple[int, ...]
    replaced_blocks: tuple[BlockReplacement, ...] = ()
    experts: ExpertOrders | None = None
    rank_tokens: tuple[int, ...] = ()
    all_decode: bool = False

    @property
    def is_decode(self) -> bool:
        """Every row computes one token and samples."""
        return all(row.num_tokens == 1 and row.samples for row in self.rows)

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced: one token (and logprob, where asked for) for each row with `samples`, in the order of the plan.

    `errors` maps request ids to what went wrong with their rows; those sequences end with ERROR, and their tokens, which must
    be present all the same (any value), are dropped.
    """

    step_id: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob | None, ...]
    errors: Mapping[str, str] = field(default_factory=dict)
