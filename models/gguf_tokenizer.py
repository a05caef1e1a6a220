"""A GGUF file's tokenizer as tokenizer.json and tokenizer_config.json.

The file carries the vocabulary, the merges (or SentencePiece scores) and the *name* of the rule that splits text before merging
(`tokenizer.ggml.pre`); the rules themselves are each model's published ones. A rule that is not known here is an error: with
another rule the text would split differently and the model would see tokens that it was never trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import PreTokenizer

from ..common.errors import ModelLoadError
from .gguf_config import USE_CHECKPOINT, Metadata

_TYPE_UNKNOWN, _TYPE_CONTROL, _TYPE_USER_DEFINED, _TYPE_UNUSED = 2, 3, 4, 5
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's mark for a space

_WORDS_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS_QWEN2 = _WORDS_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(words: str) -> PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), behavior="isolated"), byte_level])


def _byte_level_rules() -> dict[str, PreTokenizer]:
    """By `tokenizer.ggml.pre`; ByteLevel alone is GPT-2's rule."""
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return {
        "gpt-2": gpt2,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
        "llama-bpe": _split(_WORDS_LLAMA3),
        "qwen2": _split(_WORDS_QWEN2),
        "deepseek-r1-qwen": _split(_WORDS_QWEN2),
    }


def build_tokenizer(metadata: Metadata) -> Tokenizer:
    """The tokenizer that the file describes.

    Raises:
        ModelLoadError: its kind or its splitting rule is not known.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    vocabulary = {token: index for index, token in enumerate(tokens) if types[index] != _TYPE_UNUSED}
    if kind == "gpt2":
        tokenizer = _byte_level_tokenizer(metadata, vocabulary)
    elif kind == "llama":
        tokenizer = _sentencepiece_tokenizer(metadata, vocabulary)
    else:
        raise ModelLoadError(f"the GGUF file's tokenizer is of kind {kind!r}, not gpt2 or llama; {USE_CHECKPOINT}")
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind_of_token != _TYPE_USER_DEFINED)
            for token, kind_of_token in zip(tokens, types, strict=True)
            if kind_of_token in (_TYPE_UNKNOWN, _TYPE_CONTROL, _TYPE_USER_DEFINED)
        ]
    )
    if metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"):
        bos_id = metadata["tokenizer.ggml.bos_token_id"]
        bos = tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def tokenizer_config(metadata: Metadata, *, max_tokens: int) -> dict[str, Any]:
    """tokenizer_config.json; the chat template has a file of its own."""
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
        **{name: tokens[token_id] for name, token_id in ids.items() if token_id is not None},
    }


def _byte_level_tokenizer(metadata: Metadata, vocabulary: dict[str, int]) -> Tokenizer:
    rules = _byte_level_rules()
    rule = metadata.get("tokenizer.ggml.pre")
    if rule not in rules:
        raise ModelLoadError(
            f"the GGUF file's tokenizer splits text by the rule {rule!r}, which is not known (these are: {', '.join(rules)}); "
            f"{USE_CHECKPOINT}"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule == "llama-bpe"))
    if rule in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rules[rule]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece_tokenizer(metadata: Metadata, vocabulary: dict[str, int]) -> Tokenizer:
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    merges = _merges_from_scores(vocabulary, scores)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    to_mark = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), to_mark])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = to_mark
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_from_scores(vocabulary: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece merges any two neighbours whose union is a piece, the best score first: as BPE merges in that order."""
    ranked = []
    for piece, index in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-scores[index], vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]
