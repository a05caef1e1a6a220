"""A model in the caller's own process: prompts in, completions out, without Ray and without a server.

Life cycle: the constructor loads the model and starts an engine on a thread of its own; `close` (or leaving the `with` block,
or the interpreter's end) stops it. Calls may come from several threads at once; their requests share the engine's steps.
"""

from __future__ import annotations

import difflib
import itertools
import secrets
import sys
import weakref
from collections.abc import Generator, Mapping, Sequence
from dataclasses import fields
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeGuard, cast, overload

from tqdm import tqdm

from ..common.config import EngineConfig, ModelConfig, ParallelConfig, parse
from ..common.errors import ConfigError, InvalidRequest, Unavailable
from ..common.sampling_params import SamplingParams
from ..text import generation_defaults
from ..text.chat_template import ChatTemplate
from ..text.prepare import ModelLimits, PreparedRequest, prepare
from ..text.tokenizer import Tokenizer
from .batch_run import BatchRun
from .completion import Completion, CompletionBuilder, Delta
from .engine import Engine, set_up_on_this_machine
from .engine_calls import CallRouter, EngineCall

Messages: TypeAlias = Sequence[Mapping[str, Any]]
Prompt: TypeAlias = str | Sequence[int] | Messages
"""Text, token ids, or the messages of a chat (mappings with `role` and `content`)."""
Params: TypeAlias = SamplingParams | Mapping[str, Any]
"""Sampling parameters, or only some of them by name: the model's `generation_config` setting then decides about the others."""

# Requests in the engine, in multiples of what one step can run: the next are there when a place becomes free.
_ROUNDS_IN_ENGINE = 2


class Pipeline:
    """Runs a model in this process.

        with Pipeline("smollm2-135m") as pipeline:
            print(pipeline("The capital of France is", SamplingParams(max_tokens=8)).text)

    Args:
        model: a local directory, a Hub id, a .gguf file or an alias.
        options: settings of `ModelConfig` (dtype, max_model_len, generation_config, ...), `EngineConfig` (device,
            max_num_seqs, num_kv_blocks, ...) and `ParallelConfig` (tensor_parallel, expert_parallel) by name. The ranks of
            tensor_parallel above 1 are processes of this machine, started anew: a script then needs
            `if __name__ == "__main__":`.

    Attributes:
        info: facts found at the start: dtype, context, size of the KV cache.
        tokenizer: the checkpoint's.

    Raises:
        ConfigError: an unknown option (with the nearest known one), or one that does not fit.
        ModelNotFound, ModelLoadError: the model cannot be found or loaded, and why.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._model_config, self._engine_config, parallel = _split_options(model, options)
        self._router = CallRouter()
        set_up = set_up_on_this_machine(parallel)
        self._engine = Engine(self._model_config, self._engine_config, on_step=self._router, set_up=set_up)
        # Stops the engine when this object goes, at the latest at the interpreter's end.
        self._close = weakref.finalize(self, self._engine.stop)
        self._request_numbers = itertools.count(1)
        try:
            self.info = self._engine.start()
            self.tokenizer = Tokenizer.from_directory(self.info.model_path)
            self._template = ChatTemplate.from_directory(self.info.model_path)
            self._defaults = generation_defaults.load(self.info.model_path, tokenizer=self.tokenizer)
        except BaseException:
            self.close()
            raise

    @overload
    def __call__(self, prompts: str, params: Params | None = None, *, progress: bool | None = None) -> Completion: ...
    @overload
    def __call__(
        self, prompts: list[str], params: Params | Sequence[Params] | None = None, *, progress: bool | None = None
    ) -> list[Completion]: ...
    @overload
    def __call__(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params | Sequence[Params] | None = None,
        *,
        progress: bool | None = None,
    ) -> Completion | list[Completion]: ...
    def __call__(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params | Sequence[Params] | None = None,
        *,
        progress: bool | None = None,
    ) -> Completion | list[Completion]:
        """Completes a prompt, or a list of prompts in order.

        What is wrong with one prompt is in its completion's `error`; the others are completed. Interrupted (Ctrl-C), all
        that still runs is aborted.

        Args:
            prompts: one prompt or a list of them. A list of integers is one prompt of token ids, a list of mappings one chat.
            params: for all prompts, or a list with one for each.
            progress: show a bar; None shows one for more than one prompt on a terminal.

        Raises:
            InvalidRequest: the arguments are not of these kinds.
            Unavailable: the pipeline is closed.
        """
        if _is_one_prompt(prompts):
            if params is not None and not isinstance(params, (SamplingParams, Mapping)):
                raise InvalidRequest("one prompt takes one SamplingParams, not a list")
            return self._complete([prompts], [params], progress=bool(progress))[0]
        if not _is_list(prompts):
            raise InvalidRequest(f"a prompt is text, token ids or chat messages, not {prompts!r:.80}")
        if progress is None:
            progress = len(prompts) > 1 and sys.stderr.isatty()
        return self._complete(prompts, _one_for_each(params, len(prompts)), progress=progress)

    def stream(self, prompt: Prompt, params: Params | None = None) -> Generator[Delta, None, None]:
        """Yields the parts of a completion as they come; leaving the iterator early aborts the rest.

        Raises:
            InvalidRequest: the request cannot be run as it is (at once, before the first part).
            InternalError: the request failed.
        """
        if not _is_one_prompt(prompt):
            raise InvalidRequest("stream takes one prompt: text, token ids or chat messages")
        self._require_open()
        return self._iterate(*self._prepare(prompt, params))

    def close(self) -> None:
        """Aborts what is running and stops the engine. May be called again."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _iterate(self, prepared: PreparedRequest, builder: CompletionBuilder) -> Generator[Delta, None, None]:
        index_of = {request.request_id: index for index, request in enumerate(prepared.sequences)}
        with EngineCall(self._engine, self._router) as call:
            for request in prepared.sequences:
                call.submit(request)
            while not builder.is_complete:
                for output in call.wait():
                    index = index_of[output.request_id]
                    delta = builder.add(index, output)
                    if builder.should_abort(index):
                        call.abort(output.request_id)
                    if delta is not None:
                        yield delta
            if builder.error is not None:
                raise builder.error

    def _complete(self, prompts: Sequence[object], params: Sequence[Params | None], *, progress: bool) -> list[Completion]:
        self._require_open()
        with EngineCall(self._engine, self._router) as call, tqdm(total=len(prompts), disable=not progress) as bar:
            run = BatchRun(
                call,
                num_prompts=len(prompts),
                prepare=lambda number: self._prepare(prompts[number], params[number]),
                max_running=_ROUNDS_IN_ENGINE * self.info.max_num_seqs,
                on_completed=bar.update,
            )
            return list(run.run())

    def _prepare(self, prompt: object, params: Params | None) -> tuple[PreparedRequest, CompletionBuilder]:
        if not _is_one_prompt(prompt):
            raise InvalidRequest(f"a prompt is text, token ids or chat messages, not {prompt!r:.80}")
        if not isinstance(params, SamplingParams):
            mode = self._model_config.generation_config
            params = generation_defaults.merge(params or {}, defaults=self._defaults, mode=mode)
        is_chat = _is_chat(prompt)
        text = self._template.render(cast(Messages, prompt)) if is_chat else cast("str | Sequence[int]", prompt)
        prepared = prepare(
            request_id=f"pipeline-{next(self._request_numbers)}",
            prompt=text,
            params=params,
            tokenizer=self.tokenizer,
            limits=ModelLimits(
                max_model_len=self.info.max_model_len,
                vocab_size=self.info.vocab_size,
                kv_capacity_tokens=self.info.num_blocks * self.info.block_size,
            ),
            end_token_ids=self._defaults.end_token_ids,
            entropy=lambda: secrets.randbits(63),
            add_special_tokens=not is_chat,
        )
        return prepared, CompletionBuilder(prepared, self.tokenizer, continues_text=not is_chat)

    def _require_open(self) -> None:
        if not self._close.alive:
            raise Unavailable("this pipeline is closed: make a new one")


def _split_options(model: str, options: Mapping[str, Any]) -> tuple[ModelConfig, EngineConfig, ParallelConfig]:
    """Each option to the section that has it."""
    sections = (ModelConfig, EngineConfig, ParallelConfig)
    of_model, of_engine, of_parallel = ({field.name for field in fields(section)} for section in sections)
    known = (of_model | of_engine | of_parallel) - {"model", "placement"}  # there is one machine to place ranks on
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"unknown option {name!r}; {hint}")
    model_config = parse(ModelConfig, {"model": model, **{k: v for k, v in options.items() if k in of_model}})
    engine_config = parse(EngineConfig, {k: v for k, v in options.items() if k in of_engine})
    return model_config, engine_config, parse(ParallelConfig, {k: v for k, v in options.items() if k in of_parallel})


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_chat(value: object) -> TypeGuard[Messages]:
    return _is_list(value) and len(value) > 0 and isinstance(value[0], Mapping)


def _is_one_prompt(value: object) -> TypeGuard[Prompt]:
    """Whether it is one prompt, rather than a list of them or nothing of the kind."""
    is_token_ids = _is_list(value) and len(value) > 0 and all(type(item) is int for item in value)
    return isinstance(value, str) or is_token_ids or _is_chat(value)


def _one_for_each(params: Params | Sequence[Params] | None, num_prompts: int) -> Sequence[Params | None]:
    if params is None or isinstance(params, (SamplingParams, Mapping)):
        return [params] * num_prompts
    if len(params) != num_prompts:
        raise InvalidRequest(f"{len(params)} sampling parameters for {num_prompts} prompts: give one, or one for each prompt")
    return params
