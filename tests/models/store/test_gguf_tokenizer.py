"""Tokenizers rebuilt from GGUF metadata cut text as the tokenizers they came from."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import transformers
from pilotfish.models.gguf_convert import plan_conversion
from pilotfish.models.gguf_tokenizer import build_tokenizer
from pilotfish.models.store_progress import no_progress
from tokenizers import Tokenizer

TEXTS = [
    "The capital of France is Paris.",
    "line\n\n1. one\n\n2. two  1984   12",
    "<|im_start|>user\nhi<|im_end|>\n",
    "naïve 日本 🙂\ttabs\r\nand it's  spaces  ",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_tokenizer_equals_the_one_it_came_from(
    text: str, trained_tokenizer: Tokenizer, tokenizer_metadata: dict[str, Any]
) -> None:
    rebuilt = build_tokenizer(tokenizer_metadata)
    ids = rebuilt.encode(text).ids
    assert ids == trained_tokenizer.encode(text).ids
    assert rebuilt.decode(ids, skip_special_tokens=False) == text


def test_transformers_loads_it_unchanged(tmp_path: Path, tiny_gguf: Path, trained_tokenizer: Tokenizer) -> None:
    plan_conversion(tiny_gguf, progress=no_progress).write(tmp_path, progress=no_progress)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert tokenizer(text).input_ids == trained_tokenizer.encode(text).ids
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert tokenizer.model_max_length == 128
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert prompt == "<|im_start|>hi<|im_end|>"


@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        ("gpt-2", ["it", "'s", "ĠHE", "'", "S", "ĠĠ", "Ġ1984", "Ċ", "Ċ", "1", ".", "Ġ(", "x", ")", "Ċ"]),
        ("smollm", ["it", "'s", "ĠHE", "'", "S", "ĠĠĠ", "1", "9", "8", "4", "ĊĊ", "1", ".", "Ġ(", "x", ")", "Ċ"]),
        ("llama-bpe", ["it", "'s", "ĠHE", "'S", "ĠĠ", "Ġ", "198", "4", "ĊĊ", "1", ".", "Ġ(", "x", ")Ċ"]),
        ("qwen2", ["it", "'s", "ĠHE", "'S", "ĠĠ", "Ġ", "1", "9", "8", "4", "ĊĊ", "1", ".", "Ġ(", "x", ")Ċ"]),
    ],
)
def test_splitting_rules(rule: str, pieces: list[str], tokenizer_metadata: dict[str, Any]) -> None:
    """Pieces of the published tokenizers: GPT-2, SmolLM2, Llama 3 and Qwen2."""
    tokenizer = build_tokenizer(tokenizer_metadata | {"tokenizer.ggml.pre": rule, "tokenizer.ggml.add_bos_token": False})
    assert tokenizer.pre_tokenizer is not None
    found = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("it's HE'S   1984\n\n1. (x)\n")]
    assert found == pieces


def test_bos_is_added_where_the_file_says_so(tokenizer_metadata: dict[str, Any]) -> None:
    tokenizer = build_tokenizer(tokenizer_metadata | {"tokenizer.ggml.add_bos_token": True})
    assert tokenizer.encode("a").tokens == ["<|im_start|>", "a"]
    assert tokenizer.encode("a", add_special_tokens=False).tokens == ["a"]


def test_unused_tokens_are_left_out_and_user_defined_tokens_stay_whole(tokenizer_metadata: dict[str, Any]) -> None:
    tokens = [*tokenizer_metadata["tokenizer.ggml.tokens"], "<think>", "[PAD0]"]
    types = [*tokenizer_metadata["tokenizer.ggml.token_type"], 4, 5]
    changed = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    tokenizer = build_tokenizer(tokenizer_metadata | changed)
    assert tokenizer.encode("a<think>b").tokens == ["a", "<think>", "b"]
    assert tokenizer.decode(tokenizer.encode("a<think>b").ids, skip_special_tokens=True) == "a<think>b"
    assert tokenizer.token_to_id("[PAD0]") is None
    assert tokenizer.token_to_id("<think>") == len(tokens) - 2


def _sentencepiece_metadata() -> dict[str, Any]:
    pieces = ["▁", "a", "b", "c", "ab", "bc", "▁a", "abc", "▁ab", "ca", "▁▁"]
    generator = random.Random(0)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    scores = [0.0] * 259 + [-1000.0] * 4 + [-generator.uniform(1, 10) for _ in pieces[4:]]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def _naive_sentencepiece(text: str, metadata: dict[str, Any]) -> list[str]:
    """While any two neighbours form a piece, merge the two with the best score, leftmost first."""
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True))
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = enumerate(itertools.pairwise(pieces))
        unions = [(scores[left + right], -index) for index, (left, right) in pairs if left + right in scores]
        if not unions:
            break
        at = -max(unions)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return [token for piece in pieces for token in ([piece] if piece in scores else [f"<0x{b:02X}>" for b in piece.encode()])]


def test_sentencepiece_tokenizer_equals_its_definition() -> None:
    metadata = _sentencepiece_metadata()
    tokenizer = build_tokenizer(metadata)
    generator = random.Random(1)
    for _ in range(300):
        text = "".join(generator.choices("abc é", k=generator.randrange(1, 20)))
        encoding = tokenizer.encode(text)
        assert encoding.tokens == ["<s>", *_naive_sentencepiece(text, metadata)], text
        assert tokenizer.decode(encoding.ids) == text


def test_sentencepiece_without_a_space_in_front() -> None:
    tokenizer = build_tokenizer(_sentencepiece_metadata() | {"tokenizer.ggml.add_space_prefix": False})
    assert tokenizer.encode("b").tokens == ["<s>", "b"]
    assert tokenizer.decode(tokenizer.encode("b b").ids) == "b b"
