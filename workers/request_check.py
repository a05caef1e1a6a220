"""The engine's own check of what it is asked to run.

Whoever takes requests from users has explained mistakes to them in terms of text (text/prepare.py). This check is about token
ids alone and exists because one id outside the vocabulary would take down a whole step on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..common.errors import InvalidRequest
from ..common.requests import EngineRequest


def check_request(request: EngineRequest, *, vocab_size: int, max_model_len: int) -> None:
    """Raises InvalidRequest for a request that the engine cannot run as it is."""
    num_prompt, num_output, sampling = len(request.prompt_token_ids), len(request.output_token_ids), request.sampling
    if not num_prompt:
        raise InvalidRequest("the prompt is empty: it needs at least one token")
    if request.deadline_ms is not None and math.isnan(request.deadline_ms):  # it could not be put in an order
        raise InvalidRequest("deadline_ms is not a number")
    if not 0 < request.tenant.weight < math.inf:
        raise InvalidRequest(f"tenant_weight must be above 0 and finite, not {request.tenant.weight}")
    if num_prompt >= max_model_len:
        raise InvalidRequest(
            f"the prompt's {num_prompt} tokens leave no room for output: sequences of this model have at most {max_model_len}"
        )
    if num_output > min(sampling.max_tokens, max_model_len - num_prompt):
        raise InvalidRequest(
            f"{num_output} output_token_ids are more than max_tokens ({sampling.max_tokens}) or the model's context "
            f"({max_model_len}, {num_prompt} of it prompt) allows"
        )
    for what, token_ids in (
        ("prompt_token_ids", request.prompt_token_ids),
        ("output_token_ids", request.output_token_ids),
        ("logit_bias", sampling.logit_bias),
        ("end_token_ids", sampling.end_token_ids),
        *(("bad_words_ids", word) for word in sampling.bad_words_ids),
    ):
        _check_vocabulary(what, token_ids, vocab_size)
    if not all(sampling.bad_words_ids):
        raise InvalidRequest("bad_words_ids has an empty word")


def _check_vocabulary(what: str, token_ids: Iterable[int], vocab_size: int) -> None:
    lowest, highest = min(token_ids, default=0), max(token_ids, default=0)
    if lowest < 0 or highest >= vocab_size:
        bad = lowest if lowest < 0 else highest
        raise InvalidRequest(f"{what} has the token id {bad}, outside the vocabulary of {vocab_size} tokens")
