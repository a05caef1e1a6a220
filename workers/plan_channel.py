"""Messages from one process to all others of its node, in order and without loss: a ring of slots in shared memory.

One `Writer`, a fixed number of `Reader`s. A message is cut into fragments, a slot each, so it may be longer than the ring. A
slot is used again when every reader has taken what is in it: a slow reader makes `send` wait, up to its timeout. A `send` that
fails was delivered to nobody and may be repeated: readers drop a message that begins and is not completed.

The memory, in 8-byte words, a cache line for each that writes it:

    line 0       LAYOUT (published last), epoch, readers, slots, bytes of a slot
    line 1       2 x the fragments sent, + 1 when the writer has closed
    line 2 + i   of reader i: 4 x the fragments it has taken + its state; its process
    slots        number, bytes here, their offset in the message, bytes of the message, CRC; then the bytes

Fragment f (from 0) goes to slot f % slots with number f + 1. Why that is safe without locks:

- A slot is written first and line 1 last, in one aligned 8-byte store. x86 makes stores visible in their order, and CPython
  executes these in the order of the program. ARM may reorder them; there a reader can see line 1 before the slot. Hence the
  number and the CRC over it, sizes and bytes: what does not match is not there yet, and is read again.
- A reader raises its count after it has copied and checked the bytes, the writer fills a slot after it has seen the counts.
  Both stores depend on a branch over what was loaded, and no processor makes such a store visible before the loads.

Who waits sleeps until the other end changes the first word of its line (futex.py), and looks every 0.25 s whether that end
lives: whoever holds one is known to live by a lock that dies with its process. Each end decides by this one word of the other,
so no change is missed. Two things keep calls of the system from the way of a plan:

- A reader wakes the writer at every half ring that it has taken, not at every fragment. Who waits for room has a full ring
  before this reader, so such a wake comes; whether somebody waits need not be known.
- For 50 ms after a message a reader looks every 20 us by itself (Linux adds 50 us of timer slack). To be woken by the leader
  takes longer on a virtual machine: the rank's core has halted, or it is put on the leader's (docs/performance.md).
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Sequence

from ..common.errors import InternalError
from .shared_segment import SharedSegment

_LAYOUT = int.from_bytes(b"PFring\0\x02", "little")
_LINE_WORDS = 8
_LINE_BYTES = 64
_SENT_WORD = _LINE_WORDS
_ABSENT, _ATTACHED, _LEFT = range(3)  # a reader's state
_STATE_BITS, _STATE_MASK = 2, 3
_HEAD = struct.Struct("=4Q")  # number, bytes here, offset, bytes of the message
_CRC_WORD = 4

_LIVENESS_INTERVAL_S = 0.25
_DOZE_S = 20e-6
_DOZE_AFTER_MESSAGE_S = 50e-3
_DAMAGED_AFTER_S = 1.0


class ChannelClosed(InternalError):
    """The other end has closed or died; everything that was sent before has been received."""


class SlowReader(InternalError):
    """`reader` has not taken what was sent within the timeout."""

    def __init__(self, reader: str, message: str) -> None:
        super().__init__(message)
        self.reader = reader


class LostReader(InternalError):
    """`reader` has left, died or never came."""

    def __init__(self, reader: str, message: str) -> None:
        super().__init__(message)
        self.reader = reader


class MessageTooLarge(InternalError):
    """A message is over the limit; nothing of it was sent."""


class Writer:
    """The sending end. Creates the segment; for one thread at a time."""

    def __init__(
        self,
        name: str,
        *,
        epoch: int,
        readers: Sequence[str],
        num_slots: int = 32,
        slot_bytes: int = 64 * 1024,
        max_message_bytes: int = 64 * 1024 * 1024,
    ) -> None:
        """`name` is unique on the node and has the epoch in it; `readers` are names for errors, by index.

        Raises:
            ConfigError: the name is taken, or there is not enough shared memory.
        """
        self._readers = tuple(readers)
        self._num_slots = num_slots
        self._slot_bytes = -(-slot_bytes // _LINE_BYTES) * _LINE_BYTES
        self._max_message_bytes = max_message_bytes
        self._num_sent = 0  # fragments
        self._num_taken = 0  # by the slowest reader, when last looked at
        self._first_slot = (2 + len(readers)) * _LINE_WORDS
        num_bytes = self._first_slot * 8 + num_slots * (_LINE_BYTES + self._slot_bytes)
        self._segment = SharedSegment.create(name, num_bytes=num_bytes)
        self._segment.hold(0)
        self._words = self._segment.words
        self._words[1], self._words[2], self._words[3], self._words[4] = epoch, len(readers), num_slots, self._slot_bytes
        self._words[0] = _LAYOUT

    def wait_for_readers(self, timeout_s: float) -> None:
        """Returns when all readers are here; the segment then has no name, and ends with the last process that uses it.

        Raises:
            LostReader: one has not come in time.
        """
        limit = _Limit(timeout_s)
        for index, reader in enumerate(self._readers):
            word = _reader_word(index)
            while (seen := self._words[word]) & _STATE_MASK == _ABSENT:
                if not limit.wait(self._segment, word, seen):
                    raise LostReader(reader, f"{reader} did not open the channel of step plans within {timeout_s:g} s")
        self._segment.remove_name()

    def send(self, message: bytes | bytearray | memoryview, timeout_s: float) -> None:
        """Hands the message to every reader, waiting for room as long as `timeout_s` in all.

        Raises:
            SlowReader, LostReader: a reader did not take what came before; it is named, and nobody gets this message.
            MessageTooLarge: over `max_message_bytes`.
        """
        num_bytes = len(message)
        if num_bytes > self._max_message_bytes:
            raise MessageTooLarge(f"a message of {num_bytes} bytes; this channel takes up to {self._max_message_bytes}")
        limit = _Limit(timeout_s)
        view = memoryview(message)
        for offset in range(0, num_bytes or 1, self._slot_bytes):
            self._wait_for_room(limit, timeout_s)
            self._publish(view[offset : offset + self._slot_bytes], offset, num_bytes)

    def close(self) -> None:
        """Readers get what was sent, then ChannelClosed."""
        if self._segment.is_open:
            self._segment.set_and_wake(_SENT_WORD, 2 * self._num_sent + 1)
        self._segment.close()

    def _publish(self, fragment: memoryview, offset: int, message_bytes: int) -> None:
        words, number = self._words, self._num_sent + 1
        word = self._first_slot + self._num_sent % self._num_slots * (_LINE_BYTES + self._slot_bytes) // 8
        start = word * 8 + _LINE_BYTES
        self._segment.data[start : start + len(fragment)] = fragment
        head = _HEAD.pack(number, len(fragment), offset, message_bytes)
        words[word + 1], words[word + 2], words[word + 3] = len(fragment), offset, message_bytes
        words[word + _CRC_WORD] = zlib.crc32(fragment, zlib.crc32(head))
        words[word] = number
        self._num_sent = number
        self._segment.set_and_wake(_SENT_WORD, 2 * number)

    def _wait_for_room(self, limit: _Limit, timeout_s: float) -> None:
        for index, reader in enumerate(self._readers):
            if self._words[_reader_word(index)] & _STATE_MASK == _LEFT:
                raise LostReader(reader, f"{reader} has closed the channel of step plans")
        while self._num_sent - self._num_taken == self._num_slots:
            seen = [self._words[_reader_word(index)] for index in range(len(self._readers))]
            taken = [word >> _STATE_BITS for word in seen]
            self._num_taken = min(taken, default=self._num_sent)
            if self._num_sent - self._num_taken < self._num_slots:
                return
            slowest = taken.index(self._num_taken)
            reader, state, word = self._readers[slowest], seen[slowest] & _STATE_MASK, _reader_word(slowest)
            if state == _LEFT or (state == _ATTACHED and limit.is_check_due() and not self._segment.is_held(1 + slowest)):
                raise LostReader(reader, f"{reader} (process {self._words[word + 1]}) is gone")
            if not limit.wait(self._segment, word, seen[slowest]):
                left = "has not opened the channel" if state == _ABSENT else f"has taken {self._num_taken} fragments"
                raise SlowReader(reader, f"{reader} {left} of {self._num_sent} sent, and no more within {timeout_s:g} s")


class Reader:
    """A receiving end; for one thread at a time."""

    def __init__(self, name: str, *, epoch: int, index: int, timeout_s: float) -> None:
        """Opens the writer's segment as its reader `index`, waiting for it to be made.

        Raises:
            ChannelClosed: there is none within `timeout_s`.
            InternalError: it is not this epoch's, or this reader is there already.
        """
        self._segment = _open(name, timeout_s)
        self._words = words = self._segment.words
        self._num_slots, self._slot_bytes = words[3], words[4]
        self._half_ring = max(1, self._num_slots // 2)
        self._word = _reader_word(index)
        problem = ""
        if words[1] != epoch:
            problem = f"it belongs to epoch {words[1]}, not {epoch}"
        elif index >= words[2]:
            problem = f"it has {words[2]} readers, and none of index {index}"
        elif words[self._word] != _ABSENT:
            problem = f"reader {index} was here already (process {words[self._word + 1]})"
        if problem:
            self._segment.close()
            raise InternalError(f"the channel {name} is not for this rank: {problem}")
        self._first_slot = (2 + words[2]) * _LINE_WORDS
        self._num_taken = 0
        self._partial = bytearray()
        self._mismatch_since_s: float | None = None
        self._doze_until_s = 0.0
        self._segment.hold(1 + index)
        words[self._word + 1] = os.getpid()
        self._tell(_ATTACHED)

    def receive(self, timeout_s: float) -> bytes | None:
        """The next message, or None if there is none within `timeout_s`.

        Raises:
            ChannelClosed: there will be none: the writer has closed, or died.
            InternalError: the memory is damaged.
        """
        limit = _Limit(timeout_s)
        while True:
            is_dead = limit.is_check_due() and not self._segment.is_held(0)  # before the look at what it has sent
            seen = self._words[_SENT_WORD]
            num_sent, is_closed = seen >> 1, seen & 1
            if self._take(num_sent):
                message, self._partial = bytes(self._partial), bytearray()
                self._doze_until_s = time.monotonic() + _DOZE_AFTER_MESSAGE_S
                return message
            is_all_taken = self._num_taken == num_sent
            if is_all_taken and (is_closed or is_dead):
                raise ChannelClosed(f"the leader has {'closed' if is_closed else 'died and left'} the channel of step plans")
            if is_all_taken and time.monotonic() > self._doze_until_s:
                is_in_time = limit.wait(self._segment, _SENT_WORD, seen)
            else:
                is_in_time = limit.doze()
            if not is_in_time:
                return None

    def close(self) -> None:
        if self._segment.is_open:
            self._tell(_LEFT)
        self._segment.close()

    def _tell(self, state: int) -> None:
        self._segment.set_and_wake(self._word, self._num_taken << _STATE_BITS | state)

    def _take(self, num_sent: int) -> bool:
        """Takes fragments up to number `num_sent` or to the end of a message; whether it came to one."""
        words, data = self._words, self._segment.data
        while self._num_taken < num_sent:
            number = self._num_taken + 1
            word = self._first_slot + self._num_taken % self._num_slots * (_LINE_BYTES + self._slot_bytes) // 8
            start = word * 8
            head = bytes(data[start : start + _HEAD.size])
            number_here, num_bytes, offset, message_bytes = _HEAD.unpack(head)
            start += _LINE_BYTES
            fragment = bytes(data[start : start + min(num_bytes, self._slot_bytes)])
            if number_here != number or zlib.crc32(fragment, zlib.crc32(head)) != words[word + _CRC_WORD]:
                self._note_mismatch(number)
                return False
            self._num_taken = number
            if number % self._half_ring == 0:
                self._tell(_ATTACHED)
            else:
                words[self._word] = number << _STATE_BITS | _ATTACHED
            self._mismatch_since_s = None
            if offset == 0:
                self._partial = bytearray()
            self._partial += fragment
            if len(self._partial) == message_bytes:
                return True
        return False

    def _note_mismatch(self, number: int) -> None:
        now_s = time.monotonic()
        if self._mismatch_since_s is None:
            self._mismatch_since_s = now_s
        elif now_s - self._mismatch_since_s > _DAMAGED_AFTER_S:
            raise InternalError(f"fragment {number} of the channel of step plans is damaged")


class _Limit:
    """What bounds one wait: its deadline, and when to look whether the other end lives."""

    def __init__(self, timeout_s: float) -> None:
        now_s = time.monotonic()
        self._deadline_s = now_s + timeout_s
        self._check_s = now_s + min(_LIVENESS_INTERVAL_S, timeout_s)

    def wait(self, segment: SharedSegment, word: int, seen: int) -> bool:
        """Sleeps while the word is what was seen, or until it is time for a look; False at once when the time is over."""
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            return False
        segment.wait(word, seen, min(left_s, _LIVENESS_INTERVAL_S))
        return True

    def doze(self) -> bool:
        """Sleeps a little; False at once when the time is over."""
        if time.monotonic() >= self._deadline_s:
            return False
        time.sleep(_DOZE_S)
        return True

    def is_check_due(self) -> bool:
        """True now and then: whether the other end lives is a question for the system."""
        now_s = time.monotonic()
        if now_s < self._check_s:
            return False
        self._check_s = now_s + _LIVENESS_INTERVAL_S
        return True


def _open(name: str, timeout_s: float) -> SharedSegment:
    limit = _Limit(timeout_s)
    while True:
        try:
            segment = SharedSegment.open(name)
        except (FileNotFoundError, ValueError):
            pass
        else:
            if segment.words[0] == _LAYOUT:
                return segment
            segment.close()
        if not limit.doze():
            raise ChannelClosed(f"no channel {name} within {timeout_s:g} s: the leader has not made it, or has closed it")


def _reader_word(index: int) -> int:
    return (2 + index) * _LINE_WORDS
