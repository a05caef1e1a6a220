"""What was sent to which replica and has not ended: exact, since every request and every output passes the controller.

A lease begins with `open` (sent, or held until its replica has room) and ends with `close`. Step reports move it on: prompt
tokens that a step computed leave `queued_tokens`, oldest lease first, and a first output says that its prompt is done.
`drift` compares with what the replica says of itself; only a leak on either side can make it differ from 0 once nothing is
under way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..common.requests import EngineLoad, StepOutput


@dataclass(frozen=True, slots=True)
class Drift:
    """Ledger minus report: requests, prompt tokens that wait to be computed, KV blocks."""

    requests: int
    tokens: int
    blocks: int


@dataclass(slots=True)
class _Lease:
    """`num_tokens`: prompt and outputs; `queued_tokens`: uncached ones of the prompt that no step has computed yet;
    `matched_tokens`: what a prefix hit is to save, which the replica counts as queued until it starts on the prompt."""

    replica: str
    hashes: Sequence[bytes]
    num_tokens: int
    queued_tokens: int
    matched_tokens: int
    is_held: bool
    is_started: bool = False
    is_decoding: bool = False


@dataclass(slots=True)
class Account:
    """One replica's sums. Held leases are in `num_held` and `held_tokens` alone."""

    num_sent: int = 0
    num_held: int = 0
    queued_tokens: int = 0
    held_tokens: int = 0
    unstarted_matched_tokens: int = 0
    num_private_blocks: int = 0
    prefix_references: Counter[bytes] = field(default_factory=Counter)
    prefilling: dict[str, _Lease] = field(default_factory=dict)

    @property
    def num_blocks(self) -> int:
        """KV blocks that all that was sent will hold; a shared prefix counts once."""
        return self.num_private_blocks + len(self.prefix_references)

    def num_new_blocks(self, hashes: Sequence[bytes], num_blocks: int) -> int:
        """Of a sequence's `num_blocks`, those that no sequence here holds already."""
        shared = next((i for i, block_hash in enumerate(hashes) if block_hash not in self.prefix_references), len(hashes))
        return num_blocks - shared


class Ledger:
    """See the module."""

    def __init__(self, *, block_size: int) -> None:
        self._block_size = block_size
        self._accounts: dict[str, Account] = {}
        self._leases: dict[str, _Lease] = {}

    def add_replica(self, replica: str) -> None:
        self._accounts[replica] = Account()

    def remove_replica(self, replica: str) -> None:
        """Its leases end with it."""
        del self._accounts[replica]
        self._leases = {request_id: lease for request_id, lease in self._leases.items() if lease.replica != replica}

    def of(self, replica: str) -> Account:
        return self._accounts[replica]

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def open(
        self,
        request_id: str,
        replica: str,
        *,
        hashes: Sequence[bytes],
        num_tokens: int,
        matched_tokens: int,
        is_held: bool = False,
    ) -> None:
        """A request of `num_tokens`, whose full blocks are `hashes`, goes to a replica that has `matched_tokens` of it."""
        lease = _Lease(replica, hashes, num_tokens, num_tokens - matched_tokens, matched_tokens, is_held)
        self._leases[request_id] = lease
        account = self._accounts[replica]
        if is_held:
            account.num_held += 1
            account.held_tokens += lease.queued_tokens
            return
        account.num_sent += 1
        account.queued_tokens += lease.queued_tokens
        account.unstarted_matched_tokens += matched_tokens
        account.prefilling[request_id] = lease
        account.prefix_references.update(hashes)
        account.num_private_blocks += self._num_private(lease)

    def close(self, request_id: str) -> None:
        """The request ended there or left; an unknown id is ignored."""
        self.first_token(request_id)
        lease = self._leases.pop(request_id, None)
        if lease is None:
            return
        account = self._accounts[lease.replica]
        if lease.is_held:
            account.num_held -= 1
            account.held_tokens -= lease.queued_tokens
            return
        account.num_sent -= 1
        account.num_private_blocks -= self._num_private(lease)
        references = account.prefix_references
        for block_hash in lease.hashes:
            references[block_hash] -= 1
            if not references[block_hash]:
                del references[block_hash]

    def first_token(self, request_id: str) -> None:
        """The request's prompt is computed. An unknown id is ignored: it may just have ended."""
        lease = self._leases.get(request_id)
        if lease is None or lease.is_held or lease.is_decoding:
            return
        account = self._accounts[lease.replica]
        self._progress(account, lease, lease.queued_tokens)
        lease.is_decoding = True
        del account.prefilling[request_id]

    def take_step(self, replica: str, step: StepOutput) -> None:
        """Reconcile with a step: what it computed, produced and ended there."""
        account, size = self._accounts[replica], self._block_size
        num_prompt_tokens = step.num_batched_tokens
        for output in step.sequences:
            lease = self._leases.get(output.request_id)
            if lease is None or lease.replica != replica or lease.is_held:
                continue
            if not lease.is_decoding:
                num_prompt_tokens -= lease.queued_tokens
                self.first_token(output.request_id)
            else:
                num_prompt_tokens -= len(output.token_ids)
            if output.token_ids:
                num_before, lease.num_tokens = lease.num_tokens, lease.num_tokens + len(output.token_ids)
                account.num_private_blocks += -(-lease.num_tokens // size) - -(-num_before // size)
            if output.finish_reason is not None:
                self.close(output.request_id)
        for lease in account.prefilling.values():
            if num_prompt_tokens <= 0:
                break
            taken = min(num_prompt_tokens, lease.queued_tokens - 1)  # the last one is computed when its output comes
            self._progress(account, lease, taken)
            num_prompt_tokens -= taken

    def drift(self, replica: str, report: EngineLoad) -> Drift:
        """See RoutingState in common/routing.py."""
        account = self._accounts[replica]
        return Drift(
            requests=account.num_sent - report.num_running - report.num_waiting,
            tokens=account.queued_tokens + account.unstarted_matched_tokens - report.queued_tokens,
            blocks=account.num_blocks - report.num_used_blocks,
        )

    def _progress(self, account: Account, lease: _Lease, num_tokens: int) -> None:
        if not lease.is_started:
            lease.is_started = True
            account.unstarted_matched_tokens -= lease.matched_tokens
        lease.queued_tokens -= num_tokens
        account.queued_tokens -= num_tokens

    def _num_private(self, lease: _Lease) -> int:
        return self.num_blocks_for(lease.num_tokens) - len(lease.hashes)
