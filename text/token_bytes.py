"""What a token stands for, in bytes: one rule read from the `decoder` section of tokenizer.json.

A text is the concatenation of its tokens' bytes, decoded as UTF-8, less what a rule strips at the start. That holds for the
decoders of generative models and lets text be produced token by token; another kind of decoder (WordPiece, CTC) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..common.errors import ModelLoadError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBytesRule:
    """How tokens become bytes.

    Attributes:
        to_bytes: a token of the vocabulary to the bytes it stands for.
        leading_spaces: spaces removed from the start of a text: SentencePiece puts one before the first word.
        only_in_first_token: the spaces removed are all those of the first token (the Metaspace decoder), not of the text.
        replaces_each_byte: bytes that are no character become one U+FFFD each (byte-fallback tokens), not one for each
            maximal ill-formed part as Unicode recommends and byte-level decoders do.
    """

    to_bytes: Callable[[str], bytes]
    leading_spaces: int = 0
    only_in_first_token: bool = False
    replaces_each_byte: bool = False


def rule_from_decoder(decoder: Mapping[str, Any] | None) -> TokenBytesRule:
    """The rule of a decoder section (None: tokens are words, joined by spaces).

    Raises:
        ModelLoadError: text cannot be produced token by token with this decoder.
    """
    if decoder is None:
        return TokenBytesRule(to_bytes=lambda token: b" " + token.encode(), leading_spaces=1)
    kind = decoder["type"]
    if kind == "Sequence":
        steps = decoder["decoders"]
        return rule_from_decoder(steps[0]) if len(steps) == 1 else _sequence_rule(steps)
    if kind == "ByteLevel":
        return TokenBytesRule(to_bytes=_byte_level_bytes)
    if kind == "Metaspace":
        replacement = decoder["replacement"]
        strips = decoder.get("prepend_scheme", "always") != "never"
        return TokenBytesRule(
            to_bytes=lambda token: token.replace(replacement, " ").encode(),
            leading_spaces=int(strips),
            only_in_first_token=strips,
        )
    return _sequence_rule([decoder])


def _sequence_rule(steps: list[Mapping[str, Any]]) -> TokenBytesRule:
    """SentencePiece as converted for Llama, Mistral and Gemma: Replace, ByteFallback, Fuse, Strip."""
    replacements: list[tuple[str, str]] = []
    byte_fallback = False
    leading_spaces = 0
    for step in steps:
        if step["type"] == "Replace" and "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "ByteFallback":
            byte_fallback = True
        elif step["type"] == "Strip" and step["content"] == " " and not step["stop"]:
            leading_spaces = step["start"]
        elif step["type"] != "Fuse":
            raise ModelLoadError(
                f"tokenizer.json has a decoder that cannot produce text token by token: {step}; "
                "supported: ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip of leading spaces"
            )

    def to_bytes(token: str) -> bytes:
        for old, new in replacements:
            token = token.replace(old, new)
        if byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        return token.encode()

    return TokenBytesRule(to_bytes=to_bytes, leading_spaces=leading_spaces, replaces_each_byte=byte_fallback)


def _byte_level_table() -> dict[str, int]:
    """GPT-2's printable stand-ins: bytes that print stand for themselves, the others follow from U+0100 in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_BYTE_OF_CHARACTER = _byte_level_table()


def _byte_level_bytes(token: str) -> bytes:
    """A token with a character outside the table (an added token such as an emoji) stands for itself, whole."""
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()
