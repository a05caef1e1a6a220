"""Turns a GGUF file into a Hugging Face model directory: bfloat16 safetensors, config, tokenizer, chat template.

Untouched transformers loads the result. Nothing here imports torch or transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from tokenizers import Tokenizer

from ..common.errors import ModelLoadError
from .gguf_config import Metadata, find_architecture, hf_config, token_ids
from .gguf_tensors import ROPE_FACTORS, OutputTensor, plan_tensors, write_safetensors
from .gguf_tokenizer import build_tokenizer, tokenizer_config
from .store_progress import Progress


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Everything known before the first byte is written, so that a file that cannot be converted is refused at once."""

    metadata: Metadata
    config: dict[str, Any]
    tokenizer: Tokenizer
    tensors: list[OutputTensor]

    @property
    def required_bytes(self) -> int:
        """Room for the directory: the tensors, and 16 MB for the rest (the tokenizer is the largest of it)."""
        return sum(tensor.num_bytes for tensor in self.tensors) + 16_000_000

    def write(self, directory: Path, *, progress: Progress) -> None:
        """Fill an existing, empty directory."""
        token_limit = self.config["max_position_embeddings"]
        self.tokenizer.save(str(directory / "tokenizer.json"))
        _write_json(directory / "tokenizer_config.json", tokenizer_config(self.metadata, max_tokens=token_limit))
        _write_json(directory / "config.json", self.config)
        _write_json(directory / "generation_config.json", token_ids(self.metadata))
        if template := self.metadata.get("tokenizer.chat_template"):
            (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        write_safetensors(directory / "model.safetensors", self.tensors, progress=progress)


def plan_conversion(gguf_path: Path, *, progress: Progress) -> Conversion:
    """Read a GGUF file (mapped, not loaded) and decide what to write.

    Raises:
        ModelLoadError: the file is damaged, or of a kind that cannot be converted; the message says which.
    """
    progress("Reading the GGUF file", 0, 1, unit="file")
    try:
        reader = GGUFReader(gguf_path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        conversion = _plan(reader, metadata)
    except ModelLoadError as error:
        raise ModelLoadError(f"{gguf_path}: {error}") from error
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:  # what reading a damaged file runs into
        raise ModelLoadError(f"{gguf_path} is not a whole GGUF file ({type(error).__name__}: {error}); get it again") from error
    progress("Reading the GGUF file", 1, 1, unit="file")
    return conversion


def _plan(reader: GGUFReader, metadata: Metadata) -> Conversion:
    if metadata.get("split.count", 1) > 1:
        num_parts = metadata["split.count"]
        raise ModelLoadError(f"this is one of {num_parts} parts of a GGUF file: merge them first (llama-gguf-split --merge)")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = find_architecture(metadata)
    config = hf_config(
        metadata,
        vocab_size=int(tensors["token_embd.weight"].shape[-1]),
        tensor_names=tensors,
        rope_factors=tensors[ROPE_FACTORS].data if ROPE_FACTORS in tensors else None,
    )
    return Conversion(
        metadata=metadata,
        config=config,
        tokenizer=build_tokenizer(metadata),
        tensors=plan_tensors(reader.tensors, architecture=architecture, config=config),
    )


def _write_json(path: Path, content: Metadata) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
