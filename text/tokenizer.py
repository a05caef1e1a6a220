"""The tokenizer of a checkpoint: text to token ids, token ids to bytes.

Reads tokenizer.json through the `tokenizers` package and adds the special tokens that only tokenizer_config.json names, as
transformers' AutoTokenizer does, so that both give equal ids. Immutable after loading; safe to use from threads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from ..common.errors import InvalidRequest, ModelLoadError
from .detokenizer import IncrementalDetokenizer
from .token_bytes import rule_from_decoder

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Encodes text and knows the bytes of each token; `from_directory` makes one.

    Attributes:
        vocab_size: number of token ids, added tokens included; ids are below it.
        special_ids: tokens that `skip_special_tokens` leaves out of a text.
        named_tokens: "bos_token" and its like, to the token as text.
        bos_token_id, eos_token_id: None where the checkpoint names none.
        bytes_rule: how its tokens become text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.named_tokens = named_tokens(config)
        _add_special_tokens(backend, config, self.named_tokens)
        self.bos_token_id = self._named_id(backend, "bos_token")
        self.eos_token_id = self._named_id(backend, "eos_token")
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        # Ids may have holes (added tokens placed after a padded vocabulary), so the count is not the bound.
        self.vocab_size = max([backend.get_vocab_size(with_added_tokens=True), *(token_id + 1 for token_id in added)])
        decoder = backend.decoder
        self.bytes_rule = rule_from_decoder(None if decoder is None else json.loads(decoder.__getstate__()))
        self._bytes: list[bytes | None] = [None] * self.vocab_size

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a checkpoint's directory.

        Raises:
            ModelLoadError: tokenizer.json is missing, damaged or of a kind that cannot stream text.
        """
        directory = Path(path)
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise ModelLoadError(
                f"{directory} has no tokenizer.json; write one with transformers: "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare Exception, whatever was wrong
            raise ModelLoadError(f"cannot read {file}: {error}") from error
        special_tokens = read_json_object(directory / "special_tokens_map.json")
        return cls(backend, {**special_tokens, **read_json_object(directory / "tokenizer_config.json")})

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. A rendered chat template has its special tokens already: give add_special_tokens=False.

        Raises:
            InvalidRequest: the text has a lone surrogate, which is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the text is not valid Unicode: lone surrogate at character {error.start}") from None
        # encode() would hold the GIL for as long as the text takes; the batch call does not, and skips the offsets.
        encoding = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        ids: list[int] = encoding.ids
        return ids

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that goes on where another ended: without the space that SentencePiece puts before a text."""
        for anchor in ("\n", "|", "a"):  # the first that does not become one token with the text's beginning
            anchor_ids = self.encode(anchor, add_special_tokens=False)
            ids = self.encode(anchor + text, add_special_tokens=False)
            if anchor_ids and ids[: len(anchor_ids)] == anchor_ids:
                return ids[len(anchor_ids) :]
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, as `IncrementalDetokenizer` gives it piece by piece."""
        detokenizer = IncrementalDetokenizer(self, skip_special_tokens=skip_special_tokens)
        return "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; empty for an id without a token (models pad their vocabulary)."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        found = self._bytes[token_id]
        if found is None:
            token = self._backend.id_to_token(token_id)
            found = self._bytes[token_id] = b"" if token is None else self.bytes_rule.to_bytes(token)
        return found

    def _named_id(self, backend: tokenizers.Tokenizer, name: str) -> int | None:
        return backend.token_to_id(self.named_tokens[name]) if name in self.named_tokens else None


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file; empty where there is no file.

    Raises:
        ModelLoadError: the file is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and their like, as far as a tokenizer configuration names them."""
    return {name: text for name in _NAMED_TOKENS if (text := _content(config.get(name))) is not None}


def _content(token: Any) -> str | None:
    """A token in a configuration is a string, or an object with its flags."""
    return token.get("content") if isinstance(token, Mapping) else token


def _add_special_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Tokens that only the configuration knows, and the special flag where only the configuration sets it.

    A token that tokenizer.json already marks special keeps its own flags (lstrip, rstrip).
    """
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    decoder = config.get("added_tokens_decoder") or {}
    stated = [token for _, token in sorted(decoder.items(), key=lambda item: int(item[0])) if token["content"] not in added]
    backend.add_tokens([AddedToken(**_flags(token), special=token.get("special", False)) for token in stated])
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    special = [config[name] for name in named] + list(extra.values() if isinstance(extra, Mapping) else extra)
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens(
        [
            AddedToken(**_flags(token), special=True)
            for token in special
            if (known := added.get(_content(token) or "")) is None or not known.special
        ]
    )


def _flags(token: Any) -> dict[str, Any]:
    if not isinstance(token, Mapping):
        return {"content": token, "normalized": False}
    return {name: token[name] for name in ("content", "single_word", "lstrip", "rstrip", "normalized") if name in token}
