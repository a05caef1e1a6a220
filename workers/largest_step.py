"""The profiling run: the largest step the scheduler can make, run for the memory it takes.

It goes through the real runner, with every sampling feature on, over a cache of a single page that all sequences share: what
is computed is meaningless, what is allocated is not. CUDA graphs, which are captured once the real cache is there, are measured
in the same way: the largest, whose memory the others share, and the next, for what each of the others adds.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..common.config import EngineConfig
from ..common.errors import ConfigError
from ..common.requests import EngineRequest, TokenSampling
from ..models.causal_lm import CausalLM
from ..scheduler.step_plan import AdmittedSequence, PlannedRow, StepPlan
from .chunk_graphs import chunk_sizes
from .comm import RankGroup
from .cuda_graphs import GraphRecorder, uses_graphs
from .decode_graphs import graph_sizes
from .kv_cache import KvCache
from .memory import available_bytes, measure_peak
from .model_runner import ModelRunner

_EVERYTHING = TokenSampling(
    temperature=1.0, top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.1, max_tokens=1, seed=0, logprobs=1
)


def measure_largest_step(
    model: CausalLM,
    *,
    config: EngineConfig,
    num_tokens: int,
    one_page: KvCache,
    max_model_len: int,
    group: RankGroup | None = None,
) -> int:
    """Bytes needed besides weights and cache, by a step of `num_tokens` tokens over max_num_seqs sequences and by CUDA graphs.

    All ranks of a `group` measure together.

    Raises:
        ConfigError: it does not fit into the device's memory.
    """
    cache = KvCache(one_page.layers, -(-max_model_len // config.block_size), config.block_size)
    runner = ModelRunner(model, config=config, kv_cache=cache, max_model_len=max_model_len, device=model.device, group=group)
    plan = largest_plan(model, config=config, num_tokens=num_tokens, max_model_len=max_model_len)
    try:
        with measure_peak(model.device) as peak:
            runner.launch(plan, isolate_failures=False).result()
        graph_bytes = _measure_graphs(runner, config, num_tokens) if uses_graphs(config, model.device) else 0
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"a step of {plan.num_tokens} tokens does not fit into this device's memory: lower max_num_batched_tokens "
            f"or max_num_seqs ({error})"
        ) from error
    return peak.temporary_bytes + graph_bytes


def _measure_graphs(runner: ModelRunner, config: EngineConfig, num_tokens: int) -> int:
    decodes, chunks = graph_sizes(config.max_num_seqs), chunk_sizes(num_tokens, of_data_ranks=runner.model.data is not None)
    free = available_bytes(runner.model.device)
    runner.use_graphs(decodes[-1:], chunks[-1:], recorder=GraphRecorder())
    largest = free - available_bytes(runner.model.device)
    runner.use_graphs(decodes[-2:], chunks[-2:], recorder=GraphRecorder())
    with_next = free - available_bytes(runner.model.device)
    return largest + max(len(decodes), len(chunks)) * max(0, with_next - largest)


def largest_plan(model: CausalLM, *, config: EngineConfig, num_tokens: int, max_model_len: int) -> StepPlan:
    """`num_tokens` tokens over max_num_seqs sequences, all in the scratch page; as many on every data rank."""
    shared, rest = divmod(num_tokens, config.max_num_seqs)
    admitted, rows = [], []
    for slot in range(config.max_num_seqs):
        row_tokens = min(shared + (slot < rest), max_model_len)
        request = EngineRequest(request_id=f"largest-step-{slot}", prompt_token_ids=(0,) * row_tokens, sampling=_EVERYTHING)
        page_ids = (0,) * -(-row_tokens // config.block_size)
        admitted.append(AdmittedSequence(request, slot, request.prompt_token_ids, (), 0, 0))
        rows.append(PlannedRow(request.request_id, slot, 0, row_tokens, True, page_ids, 0))
    plan = StepPlan(0, tuple(admitted), tuple(rows), ())
    return plan if model.data is None else replace(plan, rank_tokens=(plan.num_tokens,) * model.data.size)
