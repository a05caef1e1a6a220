"""A request as a caller wrote it, to what engines run: checked, tokenized, with nothing left to default.

Runs wherever requests enter (a gateway, the in-process Pipeline), off the event loop: tokenizing a long prompt takes a while.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from ..common.errors import InvalidRequest
from ..common.requests import EngineRequest, TokenSampling
from ..common.sampling_params import SamplingParams
from .tokenizer import Tokenizer

MAX_REQUEST_ID_LENGTH = 128
MAX_MESSAGES = 4096  # of a conversation


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLimits:
    """What one sequence may not exceed: the model's context, its vocabulary, and the tokens that a whole KV cache holds."""

    max_model_len: int
    vocab_size: int
    kv_capacity_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRequest:
    """A request ready to run.

    Attributes:
        params: the caller's.
        sequences: one engine request for each of the n choices, in order.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    sequences: tuple[EngineRequest, ...]


def prepare(
    *,
    request_id: str,
    prompt: str | Sequence[int],
    params: SamplingParams,
    tokenizer: Tokenizer,
    limits: ModelLimits,
    end_token_ids: Sequence[int],
    entropy: Callable[[], int],
    add_special_tokens: bool = True,
    priority: int = 0,
    deadline_ms: float | None = None,
    salt: bytes = b"",
) -> PreparedRequest:
    """Check and tokenize a request, and fan it out into its choices.

    Choice i > 0 draws from a seed that is a hash of (seed, i), so that the choices differ and each is reproducible.

    Args:
        request_id: names the request, and its only choice; choices of several are named `request_id#i`.
        prompt: text, or token ids, which are taken as they are.
        end_token_ids: the model's own, obeyed unless `params.ignore_eos`.
        entropy: draws a seed in [0, 2**63) where `params` has none.
        add_special_tokens: let the tokenizer begin a text prompt as the model expects; False for a rendered chat template.
        deadline_ms: time left.

    Raises:
        InvalidRequest: the request cannot be run as it is; the message has the numbers and what to change.
    """
    check_request_id(request_id)
    token_ids = _prompt_token_ids(prompt, tokenizer, limits, add_special_tokens=add_special_tokens)
    _check_token_ids("stop_token_ids", params.stop_token_ids, limits)
    _check_token_ids("logit_bias", params.logit_bias, limits)
    max_tokens = _resolve_max_tokens(params, len(token_ids), limits)
    seed = params.seed if params.seed is not None else entropy()
    sampling = TokenSampling(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        bad_words_ids=_bad_words_ids(params.bad_words, tokenizer),
        end_token_ids=tuple(dict.fromkeys((*(() if params.ignore_eos else end_token_ids), *params.stop_token_ids))),
        min_tokens=params.min_tokens,
        max_tokens=max_tokens,
        seed=seed,
        logprobs=params.logprobs,
    )
    sequences = tuple(
        EngineRequest(
            request_id=request_id if params.n == 1 else f"{request_id}#{index}",
            prompt_token_ids=token_ids,
            sampling=replace(sampling, seed=choice_seed(seed, index)) if index else sampling,
            priority=priority,
            deadline_ms=deadline_ms,
            salt=salt,
        )
        for index in range(params.n)
    )
    return PreparedRequest(request_id=request_id, prompt_token_ids=token_ids, params=params, sequences=sequences)


def choice_seed(seed: int, index: int) -> int:
    """The seed of a choice: the request's own for the first, a hash of both numbers for the others."""
    if index == 0:
        return seed
    data = seed.to_bytes(8, "little", signed=True) + index.to_bytes(4, "little")
    return int.from_bytes(blake2b(data, digest_size=8, person=b"pilotfish-choice").digest(), "little", signed=True)


def check_request_id(request_id: str) -> None:
    """Raises InvalidRequest unless an id can name a request ('#' is kept for its choices)."""
    valid = 0 < len(request_id) <= MAX_REQUEST_ID_LENGTH and all("!" <= character <= "~" for character in request_id)
    if not valid or "#" in request_id:
        raise InvalidRequest(
            f"request_id must be 1 to {MAX_REQUEST_ID_LENGTH} printable ASCII characters without spaces and '#', "
            f"not {request_id[: MAX_REQUEST_ID_LENGTH + 1]!r}"
        )


def _prompt_token_ids(
    prompt: str | Sequence[int], tokenizer: Tokenizer, limits: ModelLimits, *, add_special_tokens: bool
) -> tuple[int, ...]:
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidRequest("the prompt is empty: give at least one character")
        token_ids = tuple(tokenizer.encode(prompt, add_special_tokens=add_special_tokens))
    else:
        token_ids = tuple(prompt)
        _check_token_ids("the prompt", token_ids, limits)
    if not token_ids:
        raise InvalidRequest("the prompt is empty: it has no tokens; give at least one")
    return token_ids


def _check_token_ids(name: str, token_ids: Iterable[int], limits: ModelLimits) -> None:
    for token_id in token_ids:
        if type(token_id) is not int:
            raise InvalidRequest(f"{name} must hold token ids (integers), not {token_id!r}")
        if not 0 <= token_id < limits.vocab_size:
            raise InvalidRequest(
                f"{name} has the token id {token_id}, outside this model's vocabulary: ids are 0 to {limits.vocab_size - 1}"
            )


def _resolve_max_tokens(params: SamplingParams, num_prompt: int, limits: ModelLimits) -> int:
    """max_tokens as asked, or all that fits; never more than fits."""
    for capacity, what in (
        (limits.max_model_len, "the model's context"),
        (limits.kv_capacity_tokens, "the KV cache"),
    ):
        room = capacity - num_prompt
        if room < 1:
            raise InvalidRequest(
                f"the prompt has {num_prompt} tokens, but {what} has room for {capacity} tokens, at least one of them "
                f"produced: shorten the prompt to at most {capacity - 1} tokens"
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise InvalidRequest(
                f"the prompt's {num_prompt} tokens and max_tokens={params.max_tokens} make {num_prompt + params.max_tokens}, "
                f"but {what} has room for {capacity} tokens: set max_tokens to at most {room} or shorten the prompt"
            )
        if params.min_tokens > room:
            raise InvalidRequest(
                f"min_tokens={params.min_tokens} is more than the {room} tokens that {what} has room for after the prompt's "
                f"{num_prompt}: set min_tokens to at most {room} or shorten the prompt"
            )
    if params.max_tokens is not None:
        return params.max_tokens
    return min(limits.max_model_len, limits.kv_capacity_tokens) - num_prompt


def _bad_words_ids(bad_words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """A word is another token at the start of a word than inside one: each is banned with a leading space and without."""
    found: dict[tuple[int, ...], None] = {}
    for word in bad_words:
        for text in (word, " " + word.lstrip(" ")):
            token_ids = tuple(tokenizer.encode_continuation(text))
            if token_ids:
                found[token_ids] = None
    return tuple(found)
