"""Model directories made on the spot: a byte-level tokenizer with a chat template, and a tiny random Llama to go with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from pilotfish.models.config_fields import read_fields
from tokenizers import decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_tokenizer(path: Path) -> Path:
    """One token a byte (ids 0 to 255, in the alphabet's order), then an end token."""
    path.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def save_tiny_llama(path: Path, *, seed: int = 0) -> Path:
    """A random two-layer Llama with the tokenizer above; it never ends of itself within a test's few hundred tokens or does,
    but greedy text is the same on every run."""
    import torch
    import transformers

    save_tokenizer(path)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.4,
        eos_token_id=256,
        bos_token_id=None,
    )
    return save_for_workers(transformers.LlamaForCausalLM(config).to(torch.float32), path)


def save_counting_llama(path: Path) -> Path:
    """The one above in bfloat16, but after a token comes the next one (the last is followed by 0): whatever computes it, in any
    order and with any rounding, says the same text, and a token lost or repeated shows."""
    import torch
    import transformers

    save_tokenizer(path)
    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        initializer_range=0.05,
        eos_token_id=256,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    embedding = model.model.embed_tokens.weight.data
    embedding.normal_()
    model.lm_head.weight.data.copy_(embedding.roll(1, dims=0))
    return save_for_workers(model, path)


def save_tiny_mixtral(path: Path) -> Path:
    """Three layers of 8 experts that all say something else, with routers that prefer those of even number; no tokenizer."""
    import torch
    import transformers

    torch.manual_seed(3)
    config = transformers.MixtralConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        sliding_window=None,
    )
    model = transformers.MixtralForCausalLM(config).to(torch.float32)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[::2] *= 3.0
    return save_for_workers(model, path)


def save_for_workers(model: Any, path: Path) -> Path:
    """A transformers model. Its config is read here, which keeps it, so that the processes that run it need no transformers."""
    model.save_pretrained(path)
    read_fields(path / "config.json")
    return path
