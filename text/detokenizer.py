"""Token ids to text, one token at a time. One `IncrementalDetokenizer` lives as long as its sequence."""

from __future__ import annotations

from collections.abc import Set
from typing import Protocol

from .token_bytes import TokenBytesRule

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TokenSource(Protocol):
    """What is needed of a tokenizer."""

    @property
    def special_ids(self) -> Set[int]: ...
    @property
    def bytes_rule(self) -> TokenBytesRule: ...
    def token_bytes(self, token_id: int, /) -> bytes: ...


class IncrementalDetokenizer:
    """Emits text as soon as it is sure; the pieces, with `flush` at the end, add up to the whole.

    Half a UTF-8 character waits for its other bytes; bytes that cannot become a character are replaced by U+FFFD. The text is
    that of Hugging Face's decode, with one exception: where byte-fallback tokens do not form valid UTF-8, Hugging Face
    also replaces their valid neighbours; a stream cannot take back what it said.

    `continues_text` is for text that goes on where other text ended (a completion of a prompt): a SentencePiece tokenizer's
    leading space is then part of it; a text on its own (an answer in a chat) starts without.
    """

    __slots__ = ("_pending", "_rule", "_skipped_ids", "_spaces_to_strip", "_tokenizer")

    def __init__(self, tokenizer: TokenSource, *, skip_special_tokens: bool = True, continues_text: bool = False) -> None:
        self._tokenizer = tokenizer
        self._rule = tokenizer.bytes_rule
        self._skipped_ids: Set[int] = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._spaces_to_strip = 0 if continues_text else self._rule.leading_spaces
        self._pending = b""

    def push(self, token_id: int) -> str:
        """The text that this token completes: often its own, sometimes none."""
        if token_id in self._skipped_ids:
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if self._spaces_to_strip and data:
            data = self._strip_start(data)
        if self._pending:
            data = self._pending + data
            self._pending = b""
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            return self._decode_broken(data, error)

    def flush(self) -> str:
        """What still waits when no token will follow."""
        text = self._replace(len(self._pending)) if self._pending else ""
        self._pending = b""
        return text

    def _strip_start(self, data: bytes) -> bytes:
        if self._rule.only_in_first_token:
            self._spaces_to_strip = 0
            return data.replace(b" ", b"")
        stripped = data[: self._spaces_to_strip].lstrip(b" ") + data[self._spaces_to_strip :]
        self._spaces_to_strip = 0 if stripped else self._spaces_to_strip - len(data)
        return stripped

    def _decode_broken(self, data: bytes, error: UnicodeDecodeError) -> str:
        text = ""
        while True:
            text += data[: error.start].decode()
            if error.end == len(data) and error.reason == "unexpected end of data":
                self._pending = data[error.start :]
                return text
            text += self._replace(error.end - error.start)
            data = data[error.end :]
            try:
                return text + data.decode()
            except UnicodeDecodeError as following:
                error = following

    def _replace(self, num_bytes: int) -> str:
        return _REPLACEMENT * (num_bytes if self._rule.replaces_each_byte else 1)
