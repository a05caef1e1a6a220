"""A language model's head with the race of the draw in it: only logits that are wanted are stored.

    logits = x @ weight.T in float32,   score = logit + temperature * g   (sampling.py)

A row without filter, rule or log probabilities needs of its logits the best score alone. So each tile of the vocabulary keeps
three numbers of such a row (race.py's TileBests), and `sample` or `race_shard` goes on with these. The kernels for few rows do
it where that was measured to be faster (op "head_race" of tuning.py; a config of skinny_linear.py that does not split K, or
{"kernel": "logits"}). Elsewhere, and on the CPU, all logits are stored, as `linear` makes them, and there are no bests.

S rows, K inputs, V vocabulary of this rank, T tiles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import tuning
from .dispatch import choose_backend, kernel_mode
from .linear import check_linear, check_one_dtype, linear, linear_ref
from .philox import gumbel_ref, philox_uniform_ref
from .race import HeadScores, RaceRows, TileBests
from .skinny_linear import fits_race, skinny_race
from .streaming_linear import serves

FIRST_TOKEN_MULTIPLE = 4  # random numbers come in blocks of four


def race_head(x_SK: torch.Tensor, weight_VK: torch.Tensor, rows: RaceRows, *, first_token: int = 0) -> HeadScores:
    """The scores of tokens first_token to first_token + V - 1. Slots are any of 0..M-1: not checked.

    ValueError where shapes or dtypes do not fit or `first_token` is no multiple of four.
    """
    _check(x_SK, weight_VK, rows, first_token)
    if choose_backend("linear", x_SK, weight_VK) == "triton":
        check_one_dtype("race_head", x_SK, weight_VK)
        config = choose_race_config(weight_VK, len(x_SK))
        if config is not None:
            return race_head_by(x_SK, weight_VK, rows, config, first_token=first_token)
    return HeadScores(linear(x_SK, weight_VK, out_dtype=torch.float32))


def race_head_ref(
    x_SK: torch.Tensor, weight_VK: torch.Tensor, rows: RaceRows, *, tile: int, first_token: int = 0
) -> HeadScores:
    """Fills every row of both."""
    logits_SV = linear_ref(x_SK, weight_VK, out_dtype=torch.float32)
    return HeadScores(logits_SV, tile_bests_ref(logits_SV, rows, tile=tile, first_token=first_token))


def tile_bests_ref(logits_SV: torch.Tensor, rows: RaceRows, *, tile: int, first_token: int = 0) -> TileBests:
    num_rows, vocab = logits_SV.shape
    seeds_S, temperature_S1 = rows.seeds_M[rows.slots_S], rows.temperature_M[rows.slots_S].unsqueeze(1)
    uniform_SV = philox_uniform_ref(seeds_S, rows.positions_S, first_token + vocab)[:, first_token:]
    scores_SV = logits_SV + temperature_S1 * gumbel_ref(uniform_SV)
    scores_SV = scores_SV.masked_fill(scores_SV.isnan(), float("-inf"))
    scores_STN = F.pad(scores_SV, (0, -vocab % tile), value=float("-inf")).view(num_rows, -1, tile)
    scores_ST, places_ST = scores_STN.max(-1)
    tokens_ST = places_ST + torch.arange(0, vocab, tile, device=logits_SV.device)
    return TileBests(scores_ST, tokens_ST.int(), logits_SV.gather(1, tokens_ST), tile)


def choose_race_config(weight_VK: torch.Tensor, num_rows: int) -> tuning.Config | None:
    """The measured config, or None where all logits are to be stored."""
    if num_rows == 0 or kernel_mode() == "invariant":
        return None
    config = tuning.lookup("head_race", weight_VK.dtype, tuple(weight_VK.shape), num_rows, weight_VK.device)
    if config is not None and config["kernel"] == "streaming":
        if serves(config, weight_VK, num_rows, gated=False, race=True):
            return config
        config = config.get("twin")
    return config if config is not None and fits_race(config, num_rows, weight_VK.shape[1]) else None


def race_head_by(
    x_SK: torch.Tensor, weight_VK: torch.Tensor, rows: RaceRows, config: tuning.Config, *, first_token: int = 0
) -> HeadScores:
    """With a kernel of skinny_linear.py, on CUDA. ValueError where a streaming config does not suit."""
    num_rows, vocab, tile = len(x_SK), len(weight_VK), config["tile_n" if config["kernel"] == "streaming" else "block_n"]
    logits_SV = torch.empty(num_rows, vocab, dtype=torch.float32, device=x_SK.device)
    num_tiles = -(-vocab // tile)
    columns_3X = logits_SV.new_empty(3, -(-num_rows * num_tiles // 4) * 4)  # all begin at multiples of 16 bytes
    scores_ST, tokens_ST, logits_ST = columns_3X[:, : num_rows * num_tiles].view(3, num_rows, num_tiles).unbind()
    bests = TileBests(scores_ST, tokens_ST.view(torch.int32), logits_ST, tile)
    scores = HeadScores(logits_SV, bests)
    skinny_race(x_SK, weight_VK, rows, scores, config, first_token=first_token)
    return scores


def _check(x_SK: torch.Tensor, weight_VK: torch.Tensor, rows: RaceRows, first_token: int) -> None:
    check_linear(x_SK, weight_VK, None, torch.float32)
    if x_SK.dim() != 2 or len(weight_VK) == 0:
        raise ValueError(f"race_head: x {tuple(x_SK.shape)} must be [rows, inputs], weight {tuple(weight_VK.shape)} not empty")
    if first_token % FIRST_TOKEN_MULTIPLE:
        raise ValueError(f"race_head: the first token {first_token} must be a multiple of {FIRST_TOKEN_MULTIPLE}")
    for name, table_M, dtype in (("temperature", rows.temperature_M, torch.float32), ("seeds", rows.seeds_M, torch.int64)):
        if (
            table_M.dim() != 1
            or table_M.dtype != dtype
            or not table_M.is_contiguous()
            or len(table_M) != len(rows.temperature_M)
        ):
            raise ValueError(f"race_head: {name} {tuple(table_M.shape)} {table_M.dtype} must be contiguous {dtype}, one a slot")
    columns = {"slots": rows.slots_S, "positions": rows.positions_S, "wants_logits": rows.wants_logits_S}
    for name, column_S in columns.items():
        if column_S is None:
            continue
        if column_S.shape != x_SK.shape[:1] or column_S.dtype != torch.int64 or not column_S.is_contiguous():
            raise ValueError(f"race_head: {name} {tuple(column_S.shape)} {column_S.dtype} must be contiguous int64, one a row")
