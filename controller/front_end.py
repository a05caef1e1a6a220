"""From what a caller wrote to sequences an engine can run: chat template, tokenizer, defaults and checks.

The work for a long prompt runs in a small thread pool, so that it never holds the event loop. Immutable after loading.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..common.errors import InvalidRequest
from ..common.hashing import block_hashes, root_hash, version_salt
from ..common.requests import EngineRequest
from ..common.sampling_params import SamplingParams
from ..text import generation_defaults
from ..text.chat_template import ChatTemplate
from ..text.output import SequenceText
from ..text.prepare import ModelLimits, prepare
from ..text.tokenizer import Tokenizer
from .choice_text import ChoiceText, MakeText

_NUM_THREADS = 2
_LONG_CHARACTERS = 100_000  # takes seconds to tokenize at worst
_MAX_TOKENS_SHOWN = 2**18  # by tokenize
_MAX_SIZE_ON_LOOP = 1024  # what takes less time than the hop to a thread and back: a third of a millisecond
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A request in tokens: one engine request and one text state a choice.

    `prompt_hashes` are those of the prompt's full blocks under `version` of the model; `prompt_text` is set only if it was
    asked for. `text_params` and `continues_text` are what the text states were made of.
    """

    num_prompt_tokens: int
    prompt_hashes: tuple[bytes, ...]
    version: str
    prompt_text: str
    text_params: SamplingParams
    continues_text: bool
    requests: tuple[EngineRequest, ...]
    texts: tuple[ChoiceText, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenization:
    """Token ids and the bytes each one stands for."""

    token_ids: tuple[int, ...]
    tokens: tuple[bytes, ...]


class FrontEnd:
    """The served model's tokenizer, chat template and defaults.

    Attributes:
        tokenizer: for a token's bytes (logprobs).
        sampling_defaults: what a request gets where it is silent, as text.

    Raises:
        ModelLoadError: the directory lacks a readable tokenizer, template or generation configuration.
    """

    def __init__(self, model_path: str | Path, *, generation_config: Literal["openai", "model"], block_size: int) -> None:
        self._block_size = block_size
        self.tokenizer = Tokenizer.from_directory(model_path)
        self._template = ChatTemplate.from_directory(model_path)
        self._defaults = generation_defaults.load(model_path, tokenizer=self.tokenizer)
        self._merge = partial(generation_defaults.merge, defaults=self._defaults, mode=generation_config)
        params = self._merge({})
        self.sampling_defaults: Mapping[str, str] = {
            field.name: str(value) for field in fields(params) if (value := getattr(params, field.name)) not in (None, (), {})
        }
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="front-end")
        self._pool_of_long = ThreadPoolExecutor(1, thread_name_prefix="front-end-long")  # they wait for each other only

    async def prepare(
        self,
        *,
        request_id: str,
        prompt: str | Sequence[int] | None,
        messages: Sequence[Mapping[str, Any]] | None,
        continue_final_message: bool,
        sampling: Mapping[str, Any],
        limits: ModelLimits,
        priority: int,
        salt: bytes,
        version: str,
        with_prompt_text: bool,
        timeout_s: float,
    ) -> Prepared:
        """Check, render and tokenize a request; arguments as `InferenceService.start_request`.

        Raises:
            InvalidRequest.
            TimeoutError: it took longer than `timeout_s`.
        """
        if (prompt is None) == (messages is None):
            raise InvalidRequest("give either a prompt or messages")

        def work() -> Prepared:
            params = self._merge(sampling)
            source = self._render(messages, continue_final_message) if messages is not None else prompt
            assert source is not None
            ready = prepare(
                request_id=request_id,
                prompt=source,
                params=params,
                tokenizer=self.tokenizer,
                limits=limits,
                end_token_ids=self._defaults.end_token_ids,
                entropy=lambda: secrets.randbits(63),
                add_special_tokens=messages is None,
                priority=priority,
                salt=salt,
            )
            prompt_text = ""
            if with_prompt_text:
                prompt_text = source if isinstance(source, str) else self.tokenizer.decode(source)
            return prepared_choices(
                ready.sequences,
                text_params=ready.params,
                continues_text=messages is None,
                prompt_text=prompt_text,
                prompt_hashes=prompt_hashes(ready.sequences[0], self._block_size, version=version),
                version=version,
                make_text=self.make_text,
            )

        if self._is_short(prompt if messages is None else messages, sampling):
            return work()
        async with asyncio.timeout(timeout_s):
            return await self._off_loop(work, prompt if isinstance(prompt, str) else messages)

    def make_text(self, params: SamplingParams, continues_text: bool) -> ChoiceText:
        """The text state of a choice that has seen no token."""
        return SequenceText(self.tokenizer, params, continues_text=continues_text)

    async def tokenize(
        self, *, text: str | None, messages: Sequence[Mapping[str, Any]] | None, add_special_tokens: bool
    ) -> Tokenization:
        """See `InferenceService.tokenize`."""
        if (text is None) == (messages is None):
            raise InvalidRequest("give either a text or messages")

        def work() -> Tokenization:
            if messages is not None:
                ids = self.tokenizer.encode(self._render(messages, False), add_special_tokens=False)
            else:
                ids = self.tokenizer.encode(text or "", add_special_tokens=add_special_tokens)
            if len(ids) > _MAX_TOKENS_SHOWN:
                raise InvalidRequest(f"the text has {len(ids)} tokens; at most {_MAX_TOKENS_SHOWN} are shown: cut it in pieces")
            return Tokenization(token_ids=tuple(ids), tokens=tuple(map(self.tokenizer.token_bytes, ids)))

        return await self._off_loop(work, text if messages is None else messages)

    def close(self) -> None:
        for pool in (self._pool, self._pool_of_long):
            pool.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def _is_short(source: Any, sampling: Mapping[str, Any]) -> bool:
        num_choices = sampling.get("n")
        size = _size(source) + _size(sampling) * (num_choices if isinstance(num_choices, int) else 1)
        return size <= _MAX_SIZE_ON_LOOP

    def _render(self, messages: Sequence[Mapping[str, Any]], continue_final_message: bool) -> str:
        return self._template.render(
            messages, add_generation_prompt=not continue_final_message, continue_final_message=continue_final_message
        )

    async def _off_loop(self, work: Callable[[], T], source: str | Sequence[Any] | None) -> T:
        """`source` is what has to be tokenized."""
        pool = self._pool_of_long if _num_characters(source) > _LONG_CHARACTERS else self._pool
        return await asyncio.get_running_loop().run_in_executor(pool, work)


def _num_characters(source: str | Sequence[Any] | None) -> int:
    """Of a text or of messages."""
    if source is None or isinstance(source, str):
        return len(source or "")
    return sum(len(message["content"]) for message in source if isinstance(message, Mapping))


def _size(value: Any) -> int:
    """How much there is in it: characters, token ids, other values."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_size, value.values())) + len(value)
    if isinstance(value, (list, tuple)):
        return len(value) + (sum(map(_size, value)) if value and not isinstance(value[0], int) else 0)
    return 1


def prompt_hashes(request: EngineRequest, block_size: int, *, version: str) -> tuple[bytes, ...]:
    """Of the prompt's full blocks, for one version of the model."""
    root = root_hash(version_salt(version, request.salt))
    return tuple(block_hashes(request.prompt_token_ids, block_size, parent=root))


def prepared_choices(
    requests: tuple[EngineRequest, ...],
    *,
    text_params: SamplingParams,
    continues_text: bool,
    prompt_text: str,
    prompt_hashes: tuple[bytes, ...],
    version: str,
    make_text: MakeText,
) -> Prepared:
    """The choices of a request, which share a prompt, with text states that have seen no token."""
    return Prepared(
        num_prompt_tokens=len(requests[0].prompt_token_ids),
        prompt_hashes=prompt_hashes,
        version=version,
        prompt_text=prompt_text,
        text_params=text_params,
        continues_text=continues_text,
        requests=requests,
        texts=tuple(make_text(text_params, continues_text) for _ in requests),
    )
