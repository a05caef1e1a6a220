"""What the data ranks of a replica agree on before each step: how many tokens each brings, and whether there is a step at all.

Every leader's turn has one exchange on the host, which waits for the other leaders but never for a device: with two steps in
flight it happens while the device runs. All see the same numbers and do the same: launch a step, or none. A leader without work
for a step in which others have some brings one token of padding, so that its experts serve theirs. Where the step has orders to
experts, a second exchange brings those of the first leader to all.

Where nobody has work each leader waits a little before its next turn, longer from turn to turn; a request ends the wait of its
own leader, and the others' ends soon.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain

from ..common.errors import Unavailable
from ..common.rank_place import LEADER
from ..scheduler.step_plan import ExpertOrders, SlotWrite, StepPlan
from .data_group import StepExchange
from .expert_director import ExpertDirector

_FIRST_WAIT_S = 0.0005
_LONGEST_WAIT_S = 0.005


class ReplicaStopped(Unavailable):
    """Another leader of the replica was stopped; there are no steps without it."""


class StepAgreement:
    """One leader's side.

    Attributes:
        wait_s: how long to wait for a request before the next turn, where there is nothing to do.
    """

    def __init__(self, exchange: StepExchange, director: ExpertDirector | None) -> None:
        self._exchange = exchange
        self._director = director
        self.wait_s = 0.0

    def join(self, plan: StepPlan | None, make_empty: Callable[[], StepPlan]) -> StepPlan | None:
        """The step of this turn: `plan`, or an empty one to take part in the others', or None where nobody has work.

        Raises:
            ReplicaStopped: another leader has left.
            InternalError: another is lost.
        """
        num_tokens, is_decode = (0, True) if plan is None else (plan.num_tokens, plan.is_decode)
        orders = _to_numbers(self._director.next_orders()) if self._director is not None else ()
        words = self._exchange.exchange((num_tokens, is_decode, False, len(orders)))
        for rank, (_, _, has_left, _) in enumerate(words):
            if has_left:
                raise ReplicaStopped(f"data rank {rank} of this replica was stopped, and the others with it")
        if not any(num_tokens for num_tokens, _, _, _ in words):
            self.wait_s = min(max(2 * self.wait_s, _FIRST_WAIT_S), _LONGEST_WAIT_S)
            return None
        self.wait_s = 0.0
        if num_numbers := words[LEADER][3]:
            orders = self._exchange.exchange(orders or (0,) * num_numbers)[LEADER]
        return replace(
            plan or make_empty(),
            experts=_from_numbers(orders),
            rank_tokens=tuple(max(num_tokens, 1) for num_tokens, _, _, _ in words),
            all_decode=all(is_decode for _, is_decode, _, _ in words),
        )

    def leave(self) -> None:
        """This leader has stopped: tells the others, in place of a further turn. Raises InternalError: another is lost."""
        self._exchange.exchange((0, True, True, 0))


def _to_numbers(orders: ExpertOrders | None) -> tuple[int, ...]:
    return () if orders is None else (orders.reads_loads, orders.layer, *chain.from_iterable(orders.writes))


def _from_numbers(numbers: Sequence[int]) -> ExpertOrders | None:
    if not numbers:
        return None
    reads_loads, layer, *writes = numbers
    return ExpertOrders(bool(reads_loads), layer, tuple(map(SlotWrite, writes[::2], writes[1::2])))
