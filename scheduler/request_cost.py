"""What a request costs its replica, in milliseconds of the whole replica: the unit in which tenants share it.

    prefill   = uncached prompt tokens * t
    decode    = output tokens * step / sequences in the step
    residency = share of the KV cache held * time it is held

t: ms that a prompt token takes; step: ms of a decode step. A request that holds a tenth of the cache for a second keeps
others out of a tenth of the machine for a second. A cached prompt costs its residency only.
"""

from __future__ import annotations

from .step_times import StepTime


def request_cost_ms(
    step_time: StepTime,
    *,
    num_prompt: int,
    num_cached: int,
    num_output: float,
    num_active: int,
    kv_capacity_tokens: int,
) -> float:
    """See the module.

    Args:
        num_cached: prompt tokens that the prefix cache saves.
        num_output: expected or produced.
        num_active: sequences that run there together with this one, which counts.
        kv_capacity_tokens: tokens that the replica's KV cache holds.
    """
    num_active = max(num_active, 1)
    prefill_ms = max(num_prompt - num_cached, 1) * step_time.ms_per_token
    decode_ms = num_output * step_time.decode_ms(num_active) / num_active
    held_ms = prefill_ms + num_output * step_time.decode_ms(num_active)
    share_held = min(1.0, (num_prompt + num_output / 2) / kv_capacity_tokens)
    return prefill_ms + decode_ms + share_held * held_ms
