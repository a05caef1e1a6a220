"""Families on a GPU, through the step loop and its CUDA graphs: what they say greedily is what transformers says in float32.

test_gpu_parity.py compares all logits, without graphs. Rows here begin together and end one by one, and long prompts come in
chunks, so that graphs of several sizes, eager steps and mixed ones take turns.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checkpoints import save_checkpoint
from pilotfish.models.check import run_reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DEVICE = "cuda"
VOCAB = 512
# In standard deviations of the logits. transformers' own bfloat16 has 0.008 to 0.026; without one kind of gpt-oss's biases, or
# with sinks of zero, it would be 0.1 to 0.17.
MEDIAN_ERROR = 0.06
PROMPT_LENS = (1, 5, 17, 40, 90, 150)
OPTIONS = {"device": DEVICE, "max_in_flight": 2, "max_num_seqs": len(PROMPT_LENS), "max_num_batched_tokens": 64}

SMALL = {"vocab_size": VOCAB, "hidden_size": 192, "intermediate_size": 256, "head_dim": 32}
SMALL_LATENT = SMALL | {"kv_lora_rank": 64, "q_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}
# As released: the whole of Qwen3-0.6B, and Qwen3-30B-A3B but for the number of layers and the vocabulary.
QWEN3 = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "num_attention_heads": 16}
QWEN3_06B = QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "tie_word_embeddings": True}
QWEN3_30B_OF_TWO_LAYERS = QWEN3 | {
    "vocab_size": VOCAB,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
FLOAT32: list[tuple[str, dict[str, Any]]] = [
    ("GptOssForCausalLM", SMALL),
    ("Qwen2MoeForCausalLM", SMALL | {"shared_expert_intermediate_size": 64}),
    ("Glm4MoeForCausalLM", SMALL | {"n_group": 4, "topk_group": 2, "use_qk_norm": True}),
    ("DeepseekV2ForCausalLM", SMALL_LATENT | {"q_lora_rank": None}),
    ("DeepseekV3ForCausalLM", SMALL_LATENT | {"num_attention_heads": 32, "num_key_value_heads": 32}),
    ("Qwen3ForCausalLM", QWEN3_06B),
    ("Qwen3MoeForCausalLM", QWEN3_30B_OF_TWO_LAYERS),
]

# Widths of heads and of experts as released, but few layers and experts.
TWO_LAYERS = {"vocab_size": VOCAB, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2}
LATENT = TWO_LAYERS | {
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 16,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408,
}
BFLOAT16: list[tuple[str, dict[str, Any]]] = [
    (
        "GptOssForCausalLM",
        TWO_LAYERS
        | {
            "hidden_size": 2880,
            "intermediate_size": 720,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "num_local_experts": 8,
            "num_experts_per_tok": 4,
        },
    ),
    (
        "Qwen2MoeForCausalLM",
        TWO_LAYERS
        | {
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 352,
            "shared_expert_intermediate_size": 1408,
        },
    ),
    (
        "Glm4MoeForCausalLM",
        TWO_LAYERS
        | {
            "num_attention_heads": 24,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "use_qk_norm": True,
            "attention_bias": True,
            "n_routed_experts": 16,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1408,
        },
    ),
    ("DeepseekV2ForCausalLM", LATENT | {"q_lora_rank": None}),
    ("DeepseekV3ForCausalLM", LATENT | {"q_lora_rank": 768, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 8}),
]


@pytest.fixture
def requests(make_request):
    rng = random.Random(3)
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in PROMPT_LENS]
    return [make_request(f"r{i}", prompt, max_tokens=11 + i, logprobs=1) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize(("architecture", "config"), FLOAT32, ids=[row[0] for row in FLOAT32])
def test_float32_text_is_that_of_transformers(architecture, config, tmp_path: Path, run_requests, requests):
    untouched = save_checkpoint(tmp_path, architecture, **config)
    result = run_requests(*requests, model=tmp_path, **OPTIONS)
    for request in requests:
        expected = run_reference(untouched, request.prompt_token_ids).tokens
        assert result.tokens[request.request_id] == expected[: request.sampling.max_tokens]


@pytest.mark.parametrize(("architecture", "config"), BFLOAT16, ids=[row[0] for row in BFLOAT16])
def test_bfloat16_text_is_likely_in_float32(architecture, config, tmp_path: Path, run_requests, requests):
    """Its log probabilities are nearly those that transformers gives it.

    A median, for a token that rounding sends to another expert is far off, in transformers' own bfloat16 too.
    """
    exact = save_checkpoint(tmp_path, architecture, dtype=torch.bfloat16, **config)
    result = run_requests(*requests, model=tmp_path, dtype="bfloat16", **OPTIONS)
    errors = []
    for request in requests:
        prompt, tokens = list(request.prompt_token_ids), result.tokens[request.request_id]
        with torch.inference_mode():
            logits = exact(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]
        ours = torch.tensor([entry.logprob for entry in result.logprobs[request.request_id]])
        errors.append((ours - expected).abs() / logits.std())
    assert float(torch.cat(errors).median()) < MEDIAN_ERROR
