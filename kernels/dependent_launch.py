"""Programmatic dependent launch: a kernel of a stream is launched while the one before it still runs, and waits inside.

It hides what a launch costs between short kernels. On compute capability 9.0 or newer; elsewhere, and in Triton's
interpreter, EARLY_START is False and nothing changes. A kernel takes part by three rules:

1. It is launched with `**launch_options(device)` and takes EARLY_START: tl.constexpr.
2. It calls `let_next_start` first: the next kernel may be launched once all programs have.
3. Every program calls `wait_for_previous`, also one that leaves early, before it writes anything and before it reads what
   a kernel of the stream may have written (activations, positions, slots, caches). Only what no kernel writes while the
   model runs (weights, tables of cosines) may be read before.

A kernel that does not call `let_next_start` lets the next one start at its own end. So does any kernel of torch. What such a
kernel has written may be read before the wait by all that come after it: block tables and context lengths (decode_inputs.py),
and so may what steps before it have stored in the cache (fused_decode.py).

The wait lasts until the kernel before has finished, which waited for its own predecessor; so the stream keeps its order.

Kernels A, B, C, ... of one stream: where every program of B calls `let_next_start` only *after* `wait_for_previous`, C cannot
be launched before A has finished. So C, and what is launched once C has started, may read before its own wait what A and
those before A wrote (by `load_settled`: a line in L1 may be older than A); what B writes still needs the wait. As C then relies
on how B is written, one Python function must launch both, with nothing between, and tell C whether B is so: `run_experts` in
moe_mlp.py does. There B is a product of experts (the matrix-vector kernel follows rule 2 and is not so), C the one after it.
"""

from functools import cache

import torch
import triton
import triton.language as tl


@cache
def launch_options(device: torch.device) -> dict[str, bool]:
    """Keyword arguments for the launch of a kernel that follows these rules. A CUDA `device` carries its index."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"EARLY_START": False}
    return {"EARLY_START": True, "launch_pdl": True}


@triton.jit
def let_next_start(EARLY_START: tl.constexpr):
    if EARLY_START:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(EARLY_START: tl.constexpr):
    if EARLY_START:
        tl.extra.cuda.gdc_wait()


@triton.jit
def load_settled(pointers, mask, other):
    """A load, past L1, of what a kernel wrote that has finished although this one has not waited yet."""
    return tl.load(pointers, mask, other=other, cache_modifier=".cg")


@triton.jit
def prefetch_to_l2(pointers):
    """Asks for the 128 bytes at each pointer, all of them valid; only where EARLY_START is: the interpreter cannot."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )
