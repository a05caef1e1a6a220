"""A model with latent attention through the engine: one cached tensor a layer, the greedy tokens of transformers."""

from __future__ import annotations

import torch
from pilotfish.common.config import EngineConfig, ModelConfig
from pilotfish.scheduler.scheduler_config import SchedulerConfig
from pilotfish.scheduler.step_scheduler import StepScheduler
from pilotfish.workers.kv_cache import KvLayout, allocate_kv_cache
from pilotfish.workers.runner_setup import set_up_runner
from pilotfish.workers.step_loop import StepLoop
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

LATENT = KvLayout(block_size=16, num_layers=3, num_kv_heads=1, head_dim=24, dtype=torch.float32, values_in_keys=True)


def test_values_in_keys_take_half() -> None:
    cache = allocate_kv_cache(LATENT, num_blocks=4, device=torch.device("cpu"))
    assert LATENT.bytes_per_block == 3 * 16 * 24 * 4
    assert cache.num_bytes == 5 * LATENT.bytes_per_block
    assert all(keys is values for keys, values in cache.layers)


def test_greedy_tokens_are_those_of_transformers(tmp_path, make_request, collector) -> None:
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
    engine = EngineConfig(device="cpu", num_threads=1, num_kv_blocks=32, max_num_seqs=4, max_num_batched_tokens=16)
    runner, info = set_up_runner(ModelConfig(model=str(tmp_path), dtype="float32"), engine)
    assert info.kv_cache_bytes == 33 * 3 * info.block_size * 24 * 4
    scheduler = StepScheduler(
        SchedulerConfig(
            num_blocks=info.num_blocks,
            block_size=info.block_size,
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            max_model_len=info.max_model_len,
            prefix_caching=True,
        )
    )
    loop = StepLoop(runner, scheduler, on_step=collector, max_in_flight=2)
    shared = list(range(40, 60))
    prompts = {"a": [*shared, 1, 2, 3], "b": [7, 8], "c": [*shared, 9]}
    for name, prompt in prompts.items():
        scheduler.add(make_request(name, prompt, max_tokens=8))
    while loop.has_work:
        loop.advance()
        scheduler.check_invariants()
    loop.finish()
    for name, prompt in prompts.items():
        expected = untouched.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
        assert collector.tokens[name] == expected.tolist()
