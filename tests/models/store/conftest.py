"""Small GGUF files, and the wheels around them, made on the spot."""

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from pilotfish.models.embedded import EmbeddedModel
from pilotfish.models.store_download import Wheel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

CORPUS = [
    "The capital of France is Paris.",
    "it's 1984, and 12 of 365 days are left  99\n\n1. 2. 3.",
    "naïve 日本 🙂 def f(x):\n\n\treturn x",
]
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="session")
def trained_tokenizer() -> Tokenizer:
    """A small byte-level BPE that splits text as SmolLM2 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer_metadata(trained_tokenizer: Tokenizer) -> dict[str, Any]:
    """What a GGUF file says about `trained_tokenizer`."""
    by_id = sorted(trained_tokenizer.get_vocab().items(), key=lambda item: item[1])
    state = json.loads(trained_tokenizer.to_str())
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [token for token, _ in by_id],
        "tokenizer.ggml.token_type": [3 if token in SPECIAL_TOKENS else 1 for token, _ in by_id],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in state["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


@pytest.fixture(scope="session")
def tiny_llama_metadata(tokenizer_metadata: dict[str, Any]) -> dict[str, Any]:
    section = {
        "context_length": 128,
        "block_count": 2,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": 16,
    }
    return {f"llama.{key}": value for key, value in section.items()} | tokenizer_metadata


@pytest.fixture(scope="session")
def tiny_llama_tensors(tokenizer_metadata: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random weights of the model that `tiny_llama_metadata` describes, under their GGUF names; bfloat16 can hold them."""
    shapes = {"token_embd": (len(tokenizer_metadata["tokenizer.ggml.tokens"]), 64), "output_norm": (64,)}
    leaves = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64), "attn_norm": (64,)}
    leaves |= {"ffn_norm": (64,), "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}
    shapes |= {f"blk.{layer}.{leaf}": shape for layer in range(2) for leaf, shape in leaves.items()}
    generator = np.random.default_rng(0)
    weights = {f"{name}.weight": generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return {name: (weight.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, weight in weights.items()}


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., Path]:
    def write(
        path: Path,
        metadata: dict[str, Any],
        tensors: dict[str, np.ndarray],
        *,
        architecture: str = "llama",
        quantized: dict[str, gguf.GGMLQuantizationType] | None = None,
    ) -> Path:
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in metadata.items():
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
        for name, tensor in tensors.items():
            if quantized and name in quantized:
                writer.add_tensor(name, gguf.quantize(tensor, quantized[name]), raw_dtype=quantized[name])
            else:
                writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory, write_gguf, tiny_llama_metadata, tiny_llama_tensors) -> Path:
    """A whole model of two layers, 0.4 MB."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama_metadata, tiny_llama_tensors)


@pytest.fixture(scope="session")
def tiny_wheel(tmp_path_factory, tiny_gguf: Path) -> Path:
    """A wheel that carries `tiny_gguf` as the embedded model's wheel does."""
    path = tmp_path_factory.mktemp("wheels") / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    metadata = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: not-wanted\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tiny_gguf, "tiny_model/tiny.gguf")
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="session")
def tiny_embedded(tiny_wheel: Path) -> EmbeddedModel:
    return EmbeddedModel(
        alias="tiny",
        wheel=Wheel(
            requirement="tiny-model==1.0",
            file_name=tiny_wheel.name,
            num_bytes=tiny_wheel.stat().st_size,
            sha256=hashlib.sha256(tiny_wheel.read_bytes()).hexdigest(),
        ),
        gguf_member="tiny_model/tiny.gguf",
        required_bytes=2_000_000,
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; its models directory does not exist yet."""
    monkeypatch.setenv("PILOTFISH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def wheel_index(tiny_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip finds wheels in a local folder and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny_wheel.parent))
    return tiny_wheel.parent
