"""Counter-based random numbers: the same (seed, position, draw) gives the same number on every device and in every batch.

Philox4x32-10 with key = (low, high) 32 bits of the seed and counter = (draw // 4, low and high 32 bits of the position,
0); draw d takes word d % 4. The last counter word is free for other uses of randomness at the same position. A word w
becomes u = (w + 0.5) / 2^32 in float32, at most 1 - 2^-24: never 0 and never 1, and fine-grained near 0.

S sequences, R draws. Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3".
"""

import torch
import triton
import triton.language as tl

from .dispatch import choose_backend

_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_NUM_ROUNDS = 10
_MASK = 0xFFFFFFFF
_LARGEST_UNIFORM = tl.constexpr(1.0 - 2.0**-24)


def philox_uniform(seeds_S: torch.Tensor, positions_S: torch.Tensor, num_draws: int) -> torch.Tensor:
    """u_SR float32 in (0, 1), R = num_draws below 2^34. Seeds and positions are int64, any value."""
    if seeds_S.dim() != 1 or seeds_S.shape != positions_S.shape or num_draws < 0:
        raise ValueError(
            f"philox_uniform: seeds {tuple(seeds_S.shape)} and positions {tuple(positions_S.shape)} must be [S], "
            f"num_draws {num_draws} not negative"
        )
    if seeds_S.dtype != torch.int64 or positions_S.dtype != torch.int64:
        raise ValueError(f"philox_uniform: seeds {seeds_S.dtype} and positions {positions_S.dtype} must be int64")
    if choose_backend("philox_uniform", seeds_S) == "triton":
        return _philox_uniform_triton(seeds_S, positions_S, num_draws)
    return philox_uniform_ref(seeds_S, positions_S, num_draws)


def philox_uniform_ref(seeds_S: torch.Tensor, positions_S: torch.Tensor, num_draws: int) -> torch.Tensor:
    counter_R = torch.arange(-(-num_draws // 4), device=seeds_S.device)
    seeds_S1, positions_S1 = seeds_S.unsqueeze(1), positions_S.unsqueeze(1)
    words = philox_words_ref(
        counter=(counter_R, positions_S1 & _MASK, (positions_S1 >> 32) & _MASK, torch.zeros_like(positions_S1)),
        key=(seeds_S1 & _MASK, (seeds_S1 >> 32) & _MASK),
    )
    words_SR = torch.stack(words, dim=-1).flatten(1)[:, :num_draws]
    return ((words_SR.float() + 0.5) * 2.0**-32).clamp(max=_LARGEST_UNIFORM.value)


def philox_words_ref(*, counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The four 32-bit words (as int64) of Philox4x32-10 for a counter of four and a key of two 32-bit words."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        # An int64 product wraps around, but its 64 bits are those of the unsigned product.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


@triton.jit
def _words(seed, position, counter):
    zero = counter * 0
    position_low = zero + (position & 0xFFFFFFFF).to(tl.uint32)
    position_high = zero + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, counter, position_low, position_high, zero)


@triton.jit
def _to_uniform(words):
    return tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, _LARGEST_UNIFORM)


@triton.jit
def uniform_block(seed, position, first_draw, BLOCK: tl.constexpr):
    """u of the draws first_draw to first_draw + BLOCK, in order; first_draw and BLOCK are multiples of four."""
    w0, w1, w2, w3 = _words(seed, position, (first_draw // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32))
    return _to_uniform(tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK]))


@triton.jit
def uniform_at(seed, position, draw):
    """u of a block of draws in any order."""
    w0, w1, w2, w3 = _words(seed, position, (draw // 4).to(tl.uint32))
    word = draw % 4
    return _to_uniform(tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3)))


@triton.jit
def uniform_columns(seeds_M, positions_M, first_draw, BLOCK: tl.constexpr):
    """u [BLOCK, M] of the draws of `uniform_block`, each column by its own seed and position."""
    counter_QM = (first_draw // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)[:, None] + (positions_M * 0).to(tl.uint32)[None, :]
    w0, w1, w2, w3 = _words(seeds_M[None, :], positions_M[None, :], counter_QM)
    words_QM4 = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return _to_uniform(tl.reshape(tl.permute(words_QM4, (0, 2, 3, 1)), [BLOCK, positions_M.shape[0]]))


def gumbel_ref(uniform_SV: torch.Tensor) -> torch.Tensor:
    """-log(-log(1 - u)); log1p keeps the small exponentials exact, and these win the race."""
    return -torch.log(-torch.log1p(-uniform_SV))


@triton.jit
def gumbel(uniform):
    """-log(-log(1 - u)); small exponentials win the race, so below 2^-7 their series keeps what 1 - u would round away."""
    series = uniform * (1.0 + uniform * (0.5 + uniform * (0.3333333333333333 + uniform * 0.25)))
    exponential = tl.where(uniform < 0.0078125, series, -tl.log(1.0 - uniform))
    return -tl.log(exponential)


@triton.jit
def _philox_uniform_kernel(seeds, positions, uniform, num_draws, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    draw = first + tl.arange(0, BLOCK)
    values = uniform_block(tl.load(seeds + row), tl.load(positions + row), first, BLOCK)
    tl.store(uniform + row * num_draws + draw, values, draw < num_draws)


def _philox_uniform_triton(seeds_S: torch.Tensor, positions_S: torch.Tensor, num_draws: int) -> torch.Tensor:
    uniform_SR = torch.empty(seeds_S.shape[0], num_draws, dtype=torch.float32, device=seeds_S.device)
    if uniform_SR.numel() > 0:
        block = min(max(triton.next_power_of_2(num_draws), 16), 1024)
        grid = (seeds_S.shape[0], triton.cdiv(num_draws, block))
        _philox_uniform_kernel[grid](seeds_S.contiguous(), positions_S.contiguous(), uniform_SR, num_draws, BLOCK=block)
    return uniform_SR
