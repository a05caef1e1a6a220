"""What a checkpoint says about ending and sampling, and how a request's own parameters combine with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..common.errors import ModelLoadError
from ..common.sampling_params import SamplingParams
from .tokenizer import Tokenizer, read_json_object

# Hugging Face's name to ours.
_SAMPLING_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationDefaults:
    """Attributes:
    end_token_ids: tokens that end an answer.
    sampling: what the checkpoint states, in the names of `SamplingParams`; nothing that it leaves open.
    """

    end_token_ids: tuple[int, ...]
    sampling: Mapping[str, Any] = field(default_factory=dict)


def load(path: str | Path, *, tokenizer: Tokenizer | None = None) -> GenerationDefaults:
    """From generation_config.json, else config.json; where neither names an end token, the tokenizer's eos_token.

    A checkpoint samples only if it says `do_sample`: without it temperature 0 (greedy) applies, as in transformers.

    Raises:
        ModelLoadError: a file is damaged, or eos_token_id is neither an id nor a list of ids.
    """
    directory = Path(path)
    generation = read_json_object(directory / "generation_config.json")
    config = read_json_object(directory / "config.json")
    end = _first_stated("eos_token_id", generation, config, config.get("text_config") or {})
    if end is None and tokenizer is not None:
        end = tokenizer.eos_token_id
    ids = [] if end is None else end if isinstance(end, list) else [end]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ModelLoadError(f"{directory}: eos_token_id must be a token id or a list of them, not {end!r}")
    return GenerationDefaults(end_token_ids=tuple(dict.fromkeys(ids)), sampling=_sampling(generation))


def merge(
    explicit: Mapping[str, Any], *, defaults: GenerationDefaults, mode: Literal["openai", "model"] = "openai"
) -> SamplingParams:
    """A request's parameters: what it states, else (in mode "model") what the checkpoint states, else OpenAI's defaults.

    Raises:
        InvalidRequest: an unknown name or a value out of range.
    """
    stated = dict(defaults.sampling) if mode == "model" else {}
    if "max_tokens" in stated and explicit.get("min_tokens", 0) > stated["max_tokens"]:
        del stated["max_tokens"]  # a default never contradicts what the request asks for
    return SamplingParams.from_mapping({**stated, **explicit})


def _first_stated(name: str, *sources: Mapping[str, Any]) -> Any:
    return next((source[name] for source in sources if source.get(name) is not None), None)


def _sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    stated = {ours: generation[name] for name, ours in _SAMPLING_NAMES.items() if generation.get(name) is not None}
    if generation and not generation.get("do_sample"):
        for name in ("top_p", "top_k", "min_p"):
            stated.pop(name, None)
        stated["temperature"] = 0.0
    return stated
