"""Checkpoint directories with tokenizers only: the embedded model's, and two made here, of the two families in use."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from pilotfish.common.errors import ModelNotFound
from pilotfish.models.store import resolve
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

_CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12:34, isn't it?\n",
    "def add(first, second):\n    return first + second\n\n\nprint(add(1, 22))",
    "Schöne Grüße aus Köln: ça va? ¿Qué tal? Привет, мир! こんにちは世界",
] * 4
_ALPHABETS = [
    "abcdefghij klmnop  qrstuvwxyz ABC.,;:!?'\"\n\t0123456789",
    "äöüßéèñçøåÄÖ…€",
    "你好世界こんにちは한국어",
    "😀👍🏽👨‍👩‍👧‍👦🇫🇷❤️",
    "e\u0301a\u0308n\u0303\u200d\u200f\u00a0\u0000\ufeff",
    "привет мир שלום عربي हिन्दी ไทย",
]


def random_text(rng: random.Random, *, max_length: int = 60) -> str:
    """Scripts mixed: ASCII, accents, CJK, emoji sequences, combining marks, right-to-left."""
    return "".join(
        "".join(rng.choices(rng.choice(_ALPHABETS), k=rng.randint(1, 8))) for _ in range(rng.randint(1, max_length // 8))
    )


@pytest.fixture(scope="session")
def make_text():
    return random_text


@pytest.fixture(scope="session")
def byte_level_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|begin|>", "<|end|>"]
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<|pad|>", rstrip=True, normalized=False)])
    named = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    return _save(tokenizer, tmp_path_factory.mktemp("byte-level"), **named)


@pytest.fixture(scope="session")
def sentencepiece_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BPE with byte fallback and a space before the first word, as Llama 2 and Mistral have it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(_CORPUS[:2], trainers.BpeTrainer(vocab_size=200))
    learned = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge) for merge in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in tokens[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    directory = tmp_path_factory.mktemp("sentencepiece")
    return _save(tokenizer, directory, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    try:
        return resolve("smollm2-135m", allow_download=False).path
    except ModelNotFound as error:
        pytest.skip(f"the embedded model is not set up (`make model` does it): {error}")


@pytest.fixture(params=["byte_level_path", "sentencepiece_path", "smollm2_path"])
def any_path(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def _save(tokenizer: Tokenizer, directory: Path, **named: str) -> Path:
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
