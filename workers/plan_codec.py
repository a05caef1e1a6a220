"""StepPlans as bytes, for the ranks that follow the leader: packed little-endian columns, never pickle.

A message is a header, the sizes of the columns, and the columns: released slots, replaced blocks, tokens of the data ranks,
admitted sequences, rows, orders to experts.
A request's id travels once, with its admission, and rows name slots alone; so a decoder has memory, and sees every plan of its
epoch in order. A decoded plan equals the encoded one. What follows the header says nothing about its own types: a change to
it changes VERSION, and ranks of two versions do not understand each other.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, repeat
from typing import Any

from ..common.errors import InternalError
from ..common.requests import EngineRequest, TokenSampling
from ..common.tenants import Tenant
from ..scheduler.step_plan import AdmittedSequence, BlockReplacement, ExpertOrders, PlannedRow, SlotWrite, StepPlan

Buffer = bytes | bytearray | memoryview

MAGIC = b"PFsp"
VERSION = 3

_HEADER = struct.Struct("<4sHHQqq")  # magic, version, zero, bytes of the whole message, epoch, step id
# released slots, replaced blocks, admitted sequences, rows, new blocks of all rows, data ranks, whether all of them decode,
# whether there are orders to experts
_SIZES = struct.Struct("<6I2?")
_ORDERS = struct.Struct("<?2I")  # whether loads are read, layer, writes
# slot, num_computed, num_output, outputs known at the request's arrival, tokens, blocks, bytes of the id, of the salt and
# of the tenant's name, whether there is a deadline, the deadline, the tenant's weight, priority
_ADMITTED = struct.Struct("<9I?2dq")
# temperature, top_p, min_p, the three penalties, top_k, min_tokens, max_tokens, logprobs (-1: none), seed,
# sizes: logit_bias, bad words, tokens of all bad words, end tokens
_SAMPLING = struct.Struct("<6d4iq4I")

_new_tuple: Callable[[type[PlannedRow], Iterable[Any]], PlannedRow] = tuple.__new__


class PlanMessageError(InternalError):
    """A message is not the next plan of this epoch, or not whole."""


def encode_plan(plan: StepPlan, *, epoch: int) -> bytes:
    """The plan as one message.

    Raises:
        struct.error: a value does not fit its column (ids, positions and counts are 32 bits wide).
    """
    parts = [b"", b"", _pack("I", plan.released_slots)]
    if plan.replaced_blocks:
        parts.append(_pack("I", [n for entry in plan.replaced_blocks for n in (entry.slot, entry.index, entry.block_id)]))
    parts.append(_pack("I", plan.rank_tokens))
    for sequence in plan.admitted:
        parts += _admitted_parts(sequence)
    num_new_blocks = 0
    if plan.rows:
        _, slots, starts, num_tokens, samples, new_block_ids, output_positions = zip(*plan.rows, strict=True)
        new_blocks = tuple(chain.from_iterable(new_block_ids))
        num_new_blocks = len(new_blocks)
        parts.append(_pack("I", (*slots, *starts, *num_tokens, *output_positions, *map(len, new_block_ids), *new_blocks)))
        parts.append(bytes(samples))
    if plan.experts is not None:
        orders = plan.experts
        parts.append(_ORDERS.pack(orders.reads_loads, orders.layer, len(orders.writes)))
        parts.append(_pack("I", tuple(chain.from_iterable(orders.writes))))
    parts[1] = _SIZES.pack(
        len(plan.released_slots),
        len(plan.replaced_blocks),
        len(plan.admitted),
        len(plan.rows),
        num_new_blocks,
        len(plan.rank_tokens),
        plan.all_decode,
        plan.experts is not None,
    )
    num_bytes = _HEADER.size + sum(map(len, parts))
    parts[0] = _HEADER.pack(MAGIC, VERSION, 0, num_bytes, epoch, plan.step_id)
    return b"".join(parts)


class PlanDecoder:
    """Plans of one epoch from their messages, every one of them and in order. Unusable after an error: the epoch is over."""

    def __init__(self, *, epoch: int) -> None:
        self._epoch = epoch
        self._last_step_id: int | None = None
        self._request_ids: dict[int, str] = {}  # by slot

    def decode(self, buffer: Buffer) -> StepPlan:
        """The plan of a message.

        Raises:
            PlanMessageError: it is cut, foreign, of another version or epoch, or not the next step's.
        """
        step_id = self._check_header(buffer)
        try:
            plan = self._read(_Cursor(buffer, _HEADER.size), step_id)
        except (struct.error, ValueError) as error:  # ValueError: also of UTF-8
            raise PlanMessageError(f"the message of step {step_id} is damaged: {error}") from error
        self._last_step_id = step_id
        return plan

    def _check_header(self, buffer: Buffer) -> int:
        if len(buffer) < _HEADER.size:
            raise PlanMessageError(f"not a step plan: {len(buffer)} bytes, and its header alone has {_HEADER.size}")
        magic, version, zero, num_bytes, epoch, step_id = _HEADER.unpack_from(buffer)
        if magic != MAGIC or zero:
            raise PlanMessageError(f"not a step plan: it starts with {bytes(buffer[:8])!r}")
        if version != VERSION:
            raise PlanMessageError(f"the leader writes plans of version {version}, this rank reads version {VERSION}")
        if num_bytes != len(buffer):
            raise PlanMessageError(f"the message of step {step_id} has {len(buffer)} of {num_bytes} bytes")
        if epoch != self._epoch:
            raise PlanMessageError(f"a plan of epoch {epoch}, and this rank belongs to epoch {self._epoch}")
        if self._last_step_id is not None and step_id != self._last_step_id + 1:
            raise PlanMessageError(f"the plan of step {step_id} came after that of step {self._last_step_id}")
        return int(step_id)

    def _read(self, cursor: _Cursor, step_id: int) -> StepPlan:
        num_released, num_replaced, num_admitted, num_rows, num_new_blocks, num_ranks, all_decode, has_orders = cursor.read(
            _SIZES
        )
        released = cursor.numbers(num_released)
        replaced = cursor.numbers(3 * num_replaced)
        rank_tokens = cursor.numbers(num_ranks)
        admitted = tuple([_read_admitted(cursor) for _ in range(num_admitted)])
        slots, starts, num_tokens, output_positions, num_blocks = (cursor.numbers(num_rows) for _ in range(5))
        new_blocks = cursor.numbers(num_new_blocks)
        samples = map(bool, cursor.take(num_rows))
        orders = _read_orders(cursor) if has_orders else None
        cursor.expect_end()
        if sum(num_blocks) != num_new_blocks:
            raise ValueError(f"its rows have {sum(num_blocks)} new blocks, its head says {num_new_blocks}")

        for slot in released:
            self._request_ids.pop(slot, None)
        for sequence in admitted:
            self._request_ids[sequence.slot] = sequence.request.request_id
        try:
            request_ids = [self._request_ids[slot] for slot in slots]
        except KeyError as error:
            raise ValueError(f"slot {error} has a row, and no sequence was admitted to it") from error
        new_block_ids = _split(new_blocks, num_blocks)
        columns = zip(request_ids, slots, starts, num_tokens, samples, new_block_ids, output_positions, strict=True)
        return StepPlan(
            step_id,
            admitted,
            tuple(map(_new_tuple, repeat(PlannedRow, num_rows), columns)),  # half the time of PlannedRow(...)
            released,
            tuple([BlockReplacement(*replaced[i : i + 3]) for i in range(0, len(replaced), 3)]),
            orders,
            rank_tokens,
            all_decode,
        )


class _Cursor:
    """Reads a message front to back; struct.error beyond its end."""

    def __init__(self, buffer: Buffer, offset: int) -> None:
        self._buffer = buffer
        self._offset = offset

    def read(self, layout: struct.Struct) -> tuple[Any, ...]:
        values = layout.unpack_from(self._buffer, self._offset)
        self._offset += layout.size
        return values

    def numbers(self, count: int, code: str = "I") -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{count}{code}", self._buffer, self._offset)
        self._offset += count * struct.calcsize(code)
        return values

    def take(self, num_bytes: int) -> bytes:
        data = bytes(self._buffer[self._offset : self._offset + num_bytes])
        if len(data) != num_bytes:
            raise struct.error(f"{num_bytes} bytes wanted, {len(data)} left")
        self._offset += num_bytes
        return data

    def expect_end(self) -> None:
        if self._offset != len(self._buffer):
            raise ValueError(f"{len(self._buffer) - self._offset} bytes too many")


def _admitted_parts(sequence: AdmittedSequence) -> list[bytes]:
    request, sampling = sequence.request, sequence.request.sampling
    num_prompt = len(request.prompt_token_ids)
    assert len(sequence.token_ids) == num_prompt + sequence.num_output, "a sequence's tokens are its prompt and its outputs"
    assert len(request.output_token_ids) <= sequence.num_output, "outputs known at arrival are outputs"
    request_id, tenant = request.request_id.encode(), request.tenant.name.encode()
    bad_words = sampling.bad_words_ids
    bad_tokens = tuple(chain.from_iterable(bad_words))
    return [
        _ADMITTED.pack(
            sequence.slot,
            sequence.num_computed,
            sequence.num_output,
            len(request.output_token_ids),
            len(sequence.token_ids),
            len(sequence.block_ids),
            len(request_id),
            len(request.salt),
            len(tenant),
            request.deadline_ms is not None,
            request.deadline_ms or 0.0,
            request.tenant.weight,
            request.priority,
        ),
        _SAMPLING.pack(
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            sampling.top_k,
            sampling.min_tokens,
            sampling.max_tokens,
            -1 if sampling.logprobs is None else sampling.logprobs,
            sampling.seed,
            len(sampling.logit_bias),
            len(bad_words),
            len(bad_tokens),
            len(sampling.end_token_ids),
        ),
        request_id,
        request.salt,
        tenant,
        _pack("I", sequence.token_ids),
        _pack("I", sequence.block_ids),
        _pack("I", tuple(sampling.logit_bias)),
        _pack("d", tuple(sampling.logit_bias.values())),
        _pack("I", tuple(map(len, bad_words)) + bad_tokens + sampling.end_token_ids),
    ]


def _read_admitted(cursor: _Cursor) -> AdmittedSequence:
    slot, num_computed, num_output, num_known, *sizes, has_deadline, deadline_ms, weight, priority = cursor.read(_ADMITTED)
    num_tokens, num_blocks, id_bytes, salt_bytes, tenant_bytes = sizes
    *settings, num_bias, num_words, num_word_tokens, num_end = cursor.read(_SAMPLING)
    *floats, top_k, min_tokens, max_tokens, logprobs, seed = settings
    temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty = floats
    num_prompt = num_tokens - num_output
    if not 0 <= num_known <= num_output <= num_tokens:
        raise ValueError(f"slot {slot} has {num_tokens} tokens, {num_output} outputs, and {num_known} from before")
    request_id, salt = cursor.take(id_bytes).decode(), cursor.take(salt_bytes)
    tenant = Tenant(cursor.take(tenant_bytes).decode(), weight)
    token_ids, block_ids = cursor.numbers(num_tokens), cursor.numbers(num_blocks)
    biased, bias = cursor.numbers(num_bias), cursor.numbers(num_bias, "d")
    word_lens, word_tokens, end_token_ids = cursor.numbers(num_words), cursor.numbers(num_word_tokens), cursor.numbers(num_end)
    if sum(word_lens) != num_word_tokens:
        raise ValueError(f"the bad words of slot {slot} have {sum(word_lens)} tokens, its head says {num_word_tokens}")
    sampling = TokenSampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=dict(zip(biased, bias, strict=True)),
        bad_words_ids=tuple(_split(word_tokens, word_lens)),
        end_token_ids=end_token_ids,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        seed=seed,
        logprobs=None if logprobs < 0 else logprobs,
    )
    request = EngineRequest(
        request_id=request_id,
        prompt_token_ids=token_ids[:num_prompt],
        sampling=sampling,
        output_token_ids=token_ids[num_prompt : num_prompt + num_known],
        priority=priority,
        deadline_ms=deadline_ms if has_deadline else None,
        salt=salt,
        tenant=tenant,
    )
    return AdmittedSequence(request, slot, token_ids, block_ids, num_computed, num_output)


def _read_orders(cursor: _Cursor) -> ExpertOrders:
    reads_loads, layer, num_writes = cursor.read(_ORDERS)
    numbers = cursor.numbers(2 * num_writes)
    return ExpertOrders(reads_loads, layer, tuple(map(SlotWrite, numbers[::2], numbers[1::2])))


def _pack(code: str, values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}{code}", *values)


def _split(values: tuple[int, ...], lens: Sequence[int]) -> list[tuple[int, ...]]:
    """The values cut into runs of these lengths, most of which are 0 in a step that decodes."""
    runs: list[tuple[int, ...]] = [()] * len(lens)
    start = 0
    for index, length in enumerate(lens):
        if length:
            runs[index] = values[start : start + length]
            start += length
    return runs
