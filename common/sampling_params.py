"""What a caller may ask of sampling. Defaults are OpenAI's; names are the field's."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import InvalidRequest

MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOP_STRINGS = 16
MAX_BAD_WORDS = 1024
MAX_STRING_LENGTH = 1000  # of a stop string or a bad word, in characters
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024
MAX_NAME_LENGTH = 100  # of a wrong name that is looked up among the right ones
_INT64_MAX = 2**63 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to continue a prompt.

    Attributes:
        n: independent choices to return.
        temperature: 0 is greedy; 1 leaves the distribution as the model gave it.
        top_p: keep the smallest set of tokens whose probability reaches this (Holtzman et al. 2020), in (0, 1].
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this times as likely as the likeliest, in [0, 1].
        repetition_penalty: divides (multiplies, where negative) the logits of tokens seen in prompt or output
            (Keskar et al. 2019), as Hugging Face does; 1 is off.
        presence_penalty, frequency_penalty: OpenAI's, over the output, in [-2, 2].
        logit_bias: token id to a value in [-100, 100] added to its logit.
        bad_words: strings that must not be produced.
        stop: strings that end the text, matched over text; not part of the output unless `include_stop_str_in_output`.
        stop_token_ids: tokens that end the output besides the model's own end tokens.
        min_tokens: end tokens and stop strings are held back until this many tokens are out.
        max_tokens: most tokens to produce; None means as many as the model's context has room for.
        ignore_eos: go on past the model's end tokens.
        seed: the same seed gives the same text, alone or in a batch; None draws one.
        logprobs: None for none; k >= 0 returns each token's log probability (of the model's distribution before any other
            parameter) and the k likeliest alternatives, at most 20.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep a matched stop string in the text.

    Raises:
        InvalidRequest: a value is out of its range; the message names the parameter and the range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    max_tokens: int | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        for name, max_items in (("bad_words", MAX_BAD_WORDS), ("stop", MAX_STOP_STRINGS)):
            object.__setattr__(self, name, _strings(name, getattr(self, name), max_items=max_items))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _logit_bias(self.logit_bias))
        for name, low, high, open_low in _RANGES:
            value = getattr(self, name)
            if value is _DEFAULTS[name] or (value is None and name in _OPTIONAL):
                continue
            _check_number(name, value, low, high, open_low=open_low, integer=name in _INTEGERS)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            value = getattr(self, name)
            if value is not True and value is not False:
                raise InvalidRequest(f"{name} must be true or false, not {value!r}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(f"min_tokens ({self.min_tokens}) must not be above max_tokens ({self.max_tokens})")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Parameters from a mapping; an unknown name raises InvalidRequest with the nearest known one."""
        for name in values:
            if name not in _DEFAULTS:
                near = difflib.get_close_matches(name[:MAX_NAME_LENGTH], _DEFAULTS, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(_DEFAULTS)}"
                raise InvalidRequest(f"unknown sampling parameter {name!r}{hint}")
        return cls(**values)


_DEFAULTS = {f.name: f.default for f in fields(SamplingParams)}
_INTEGERS = {"n", "top_k", "min_tokens", "max_tokens", "seed", "logprobs"}
_OPTIONAL = {"max_tokens", "seed", "logprobs"}
# name, lowest, highest, whether the lowest itself is excluded
_RANGES: tuple[tuple[str, float, float, bool], ...] = (
    ("n", 1, MAX_CHOICES, False),
    ("temperature", 0, math.inf, False),
    ("top_p", 0, 1, True),
    ("top_k", -1, 2**31 - 1, False),
    ("min_p", 0, 1, False),
    ("repetition_penalty", 0, math.inf, True),
    ("presence_penalty", -2, 2, False),
    ("frequency_penalty", -2, 2, False),
    ("min_tokens", 0, 2**31 - 1, False),
    ("max_tokens", 1, 2**31 - 1, False),
    ("seed", -_INT64_MAX - 1, _INT64_MAX, False),
    ("logprobs", 0, MAX_TOP_LOGPROBS, False),
)


def _check_number(name: str, value: object, low: float, high: float, *, open_low: bool, integer: bool) -> None:
    kind = "an integer" if integer else "a number"
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        raise InvalidRequest(f"{name} must be {kind}, not {value!r}")
    is_huge = isinstance(value, int) and value.bit_length() > 64  # such a number may be no float, and no short text
    if is_huge or not math.isfinite(value) or value < low or value > high or (open_low and value == low):
        left = "(" if open_low else "["
        right = ")" if high == math.inf else "]"
        shown = "a number of more than 64 bits" if is_huge else repr(value)
        raise InvalidRequest(f"{name} must be {kind} in {left}{low}, {high}{right}, not {shown}")


def _strings(name: str, value: object, *, max_items: int) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, (tuple, list)) or not all(isinstance(item, str) and item for item in items):
        raise InvalidRequest(f"{name} must be a non-empty string or a list of them, not {value!r}")
    if len(items) > max_items:
        raise InvalidRequest(f"{name} has {len(items)} strings; at most {max_items} are allowed")
    for item in items:
        if len(item) > MAX_STRING_LENGTH:
            raise InvalidRequest(f"{name} has a string of {len(item)} characters; at most {MAX_STRING_LENGTH} are allowed")
        if any("\ud800" <= character <= "\udfff" for character in item):
            raise InvalidRequest(f"{name} has text that is not valid Unicode (a lone surrogate)")
    return tuple(items)


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not all(type(item) is int and 0 <= item < 2**31 for item in value):
        raise InvalidRequest(f"{name} must be a list of token ids (integers from 0), not {value!r}")
    if len(value) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(f"{name} has {len(value)} token ids; at most {MAX_STOP_TOKEN_IDS} are allowed")
    return tuple(value)


def _logit_bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"logit_bias must map token ids to numbers, not {value!r}")
    if len(value) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"logit_bias has {len(value)} entries; at most {MAX_LOGIT_BIAS} are allowed")
    result: dict[int, float] = {}
    for key, bias in value.items():
        try:
            token_id = int(key)
        except (TypeError, ValueError, OverflowError):
            raise InvalidRequest(f"logit_bias has the key {key!r}; keys must be token ids") from None
        if not 0 <= token_id < 2**31:
            raise InvalidRequest(f"logit_bias has the key {key!r}; token ids start at 0")
        _check_number(f"logit_bias[{token_id}]", bias, -100, 100, open_low=False, integer=False)
        result[token_id] = float(bias)
    return result
