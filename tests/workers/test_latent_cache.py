"""A model with latent attention through the engine: one cached tensor a layer, the greedy tokens of transformers."""

from __future__ import annotations

import torch
from pilotfish.workers.kv_cache import KvLayout, allocate_kv_cache
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

LATENT = KvLayout(block_size=16, num_layers=3, num_kv_heads=1, head_dim=24, dtype=torch.float32, values_in_keys=True)


def test_values_in_keys_take_half() -> None:
    cache = allocate_kv_cache(LATENT, num_blocks=4, device=torch.device("cpu"))
    assert LATENT.bytes_per_block == 3 * 16 * 24 * 4
    assert cache.num_bytes == 5 * LATENT.bytes_per_block
    assert all(keys is values for keys, values in cache.layers)


def test_greedy_tokens_are_those_of_transformers(tmp_path, make_loop, make_request, collector) -> None:
    torch.manual_seed(20)
    config = DeepseekV3Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=None,
    )
    untouched = DeepseekV3ForCausalLM(config).eval()
    untouched.save_pretrained(tmp_path)
    runners = []
    loop = make_loop(
        collector,
        model=tmp_path,
        max_in_flight=2,
        prepare=runners.append,
        num_threads=1,
        num_kv_blocks=32,
        max_num_seqs=4,
        max_num_batched_tokens=16,
    )
    assert runners[0]._kv_cache.num_bytes == 33 * LATENT.bytes_per_block
    shared = list(range(40, 60))
    prompts = {"a": [*shared, 1, 2, 3], "b": [7, 8], "c": [*shared, 9]}
    for name, prompt in prompts.items():
        loop.scheduler.add(make_request(name, prompt, max_tokens=8))
    while loop.has_work:
        loop.advance()
        loop.scheduler.check_invariants()
    loop.finish()
    for name, prompt in prompts.items():
        expected = untouched.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
        assert collector.tokens[name] == expected.tolist()
