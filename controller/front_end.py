"""From what a caller wrote to sequences an engine can run: chat template, tokenizer, defaults and checks.

Runs in a small thread pool, so that a long prompt never holds the event loop. Immutable after loading.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..common.errors import InvalidRequest
from ..common.requests import EngineRequest
from ..text.chat_template import ChatTemplate
from ..text.generation_defaults import load, merge
from ..text.output import SequenceText
from ..text.prepare import ModelLimits, prepare
from ..text.tokenizer import Tokenizer

_NUM_THREADS = 2
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A request in tokens: one engine request and one text state a choice. `prompt_text` is what the tokens say."""

    num_prompt_tokens: int
    prompt_text: str
    requests: tuple[EngineRequest, ...]
    texts: tuple[SequenceText, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenization:
    """Token ids and the bytes each one stands for."""

    token_ids: tuple[int, ...]
    tokens: tuple[bytes, ...]
