"""A head that keeps best scores, not logits: on a GPU against `sample` on all logits; anywhere, what goes on from there."""

import logging
from dataclasses import replace

import pytest
import torch
from pilotfish.kernels import head_race, sampling, tuning
from pilotfish.kernels.cuda import loader
from pilotfish.kernels.head_race import (
    choose_race_config,
    race_head,
    race_head_by,
    race_head_ref,
    tile_bests_ref,
)
from pilotfish.kernels.linear import TOLERANCE, linear_ref
from pilotfish.kernels.race import HeadScores, RaceRows
from pilotfish.kernels.sampling import draw_triton, sample
from pilotfish.kernels.sharded_sampling import pick_winner, pick_winner_triton, race_shard, race_shard_triton
from pilotfish.kernels.streaming_linear import TILES, launch_race, unfit_sizes

NUM_SLOTS = 140
# temperature, top_k, top_p, min_p: what slots hold, in turn
SAMPLING = [
    (0.0, 0, 1.0, 0.0),
    (0.0, 9, 0.5, 0.1),  # greedy: it has no filter
    (0.7, 0, 0.9, 0.0),
    (5.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (1.0, 7, 1.0, 0.0),
]
FILTERED = torch.tensor([False, False, True, False, False, True])
TABLES = ("temperature_M", "top_k_M", "top_p_M", "min_p_M", "seeds_M")


def make(num_rows, device):
    """What `sample` wants to know, of every eleventh slot; RaceRows that want logits where the draw reads them."""
    columns = [torch.tensor(column) for column in zip(*[SAMPLING[m % len(SAMPLING)] for m in range(NUM_SLOTS)], strict=True)]
    tables = dict(zip(TABLES, [*columns, torch.randint(-(2**63), 2**63 - 1, (NUM_SLOTS,))], strict=True))
    tables["top_k_M"] = tables["top_k_M"].int()
    slots, positions = torch.arange(num_rows) * 11 % NUM_SLOTS, torch.randint(0, 2**40, (num_rows,))
    tensors = {name: tensor.to(device) for name, tensor in (tables | {"slots_S": slots, "positions_S": positions}).items()}
    return tensors, race_rows(tensors, FILTERED[slots % len(SAMPLING)].long().to(device))


def shard_parameters(tensors):
    return {name: tensors[name] for name in ("temperature_M", "seeds_M", "slots_S", "positions_S")}


def race_rows(tensors, wants_logits):
    return RaceRows(**shard_parameters(tensors), wants_logits_S=wants_logits)


def draw(logits, tensors, bests=None):
    tables = tuple(tensors[name] for name in TABLES)
    return draw_triton(logits, tables, tensors["slots_S"], tensors["positions_S"], None, bests)[0]


# --- what goes on with bests


@pytest.mark.parametrize(("num_rows", "vocab", "tile"), [(7, 331, 64), (3, 4200, 128)])
def test_a_draw_goes_on_with_bests_where_nothing_is_filtered(device, num_rows, vocab, tile, monkeypatch):
    monkeypatch.setattr(sampling, "_PROGRAMS_AT_ONCE", 2 * num_rows)  # several chunks a program
    logits = torch.randn(num_rows, vocab, device=device) * 3
    tensors, rows = make(num_rows, device)
    wanted = rows.wants_logits_S == 1
    bests = tile_bests_ref(logits, rows, tile=tile)
    for column in (bests.scores_ST, bests.logits_ST):
        column[wanted] = float("nan")  # neither is read
    unread = logits.clone()
    unread[~wanted] = float("nan")
    assert 0 < wanted.sum() < num_rows
    assert torch.equal(draw(unread, tensors, bests).bits, draw(logits, tensors).bits)


def test_shards_go_on_with_bests(device):
    num_rows, vocab, size, tile = 9, 331, 168, 64
    race, pick = (race_shard_triton, pick_winner_triton) if device == "cpu" else (race_shard, pick_winner)
    logits = torch.randn(num_rows, vocab, device=device) * 3
    tensors, rows = make(num_rows, device)
    entries = []
    for start in (0, size):
        shard = logits[:, start : start + size]
        bests = tile_bests_ref(shard, rows, tile=tile, first_token=start)
        entries.append(race(torch.full_like(shard, float("nan")), **shard_parameters(tensors), first_token=start, bests=bests))
    no_filter = {"top_k_M": 0 * tensors["top_k_M"], "top_p_M": 0 * tensors["top_p_M"] + 1, "min_p_M": 0 * tensors["min_p_M"]}
    assert torch.equal(pick(torch.stack(entries)).bits, draw(logits, tensors | no_filter).bits)


def test_a_broken_row_draws_a_token_and_spoils_no_other(device):
    logits = torch.randn(6, 150, device=device)
    tensors, rows = make(6, device)
    tensors["slots_S"].copy_(torch.tensor([0, 1, 3, 6, 7, 9]))  # greedy and sampled, none filtered
    broken = logits.clone()
    broken[1], broken[2], broken[4, ::2], broken[3, 5] = float("nan"), -float("inf"), float("nan"), float("inf")
    drawn = draw(broken, tensors, tile_bests_ref(broken, rows, tile=64))
    expected = draw(logits, tensors)
    assert torch.equal(drawn.tokens_S[[0, 5]], expected.tokens_S[[0, 5]])
    assert drawn.logits_S.isfinite().tolist() == [True, False, False, False, True, True]
    assert drawn.tokens_S.min() >= 0
    assert drawn.tokens_S.max() < 150


@pytest.mark.parametrize(("num_rows", "block_n", "vocab", "first_token"), [(1, 16, 36, 0), (17, 64, 331, 168)])
def test_a_skinny_kernel_races(device, dtype, num_rows, block_n, vocab, first_token):
    config = {"kernel": "skinny", "block_n": block_n, "block_k": 32, "split_k": 1, "num_warps": 4, "num_stages": 2}
    x, weight = torch.randn(num_rows, 72, device=device).to(dtype), (torch.randn(vocab, 72, device=device) * 0.4).to(dtype)
    _, rows = make(num_rows, device)
    x[num_rows // 2] = float("nan")
    for wished in (rows, replace(rows, wants_logits_S=None)):
        wanted = torch.zeros_like(rows.slots_S == 0) if wished.wants_logits_S is None else rows.wants_logits_S == 1
        scores = race_head_by(x, weight, wished, config, first_token=first_token)
        expected = race_head_ref(x, weight, wished, tile=block_n, first_token=first_token)
        assert_close(scores.logits_SV[wanted], expected.logits_SV[wanted])
        assert_close(scores.bests.scores_ST[~wanted], expected.bests.scores_ST[~wanted])
        assert_close(scores.bests.logits_ST[~wanted], expected.bests.logits_ST[~wanted])
        assert torch.equal(scores.bests.tokens_ST[~wanted], expected.bests.tokens_ST[~wanted])


def assert_close(y, expected):
    torch.testing.assert_close(
        y, expected, rtol=TOLERANCE[torch.float32][0], atol=3 * TOLERANCE[torch.float32][1], equal_nan=True
    )


def test_on_the_cpu_there_are_all_logits_and_no_bests():
    x, weight = torch.randn(5, 24), torch.randn(70, 24).bfloat16()
    tensors, rows = make(5, "cpu")
    scores = race_head(x, weight, rows)
    torch.testing.assert_close(scores.logits_SV, race_head_ref(x, weight, rows, tile=64).logits_SV)
    assert scores.bests is None
    bests = tile_bests_ref(scores.logits_SV, rows, tile=64)
    with pytest.raises(ValueError, match="GPU"):
        sample(scores.logits_SV, **tensors, bests=bests)
    with pytest.raises(ValueError, match="GPU"):
        race_shard(scores.logits_SV, **shard_parameters(tensors), first_token=0, bests=bests)


def test_bests_by_hand():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0, -1.0, -1.0], [float("nan"), float("nan"), 0.0, -float("inf"), 7.0, 7.5]])
    rows = RaceRows(torch.zeros(1), torch.zeros(1).long(), torch.zeros(2).long(), torch.zeros(2).long())
    bests = tile_bests_ref(logits, rows, tile=2)
    assert bests.tokens_ST.tolist() == [[1, 2, 4], [0, 2, 5]]
    assert bests.scores_ST.tolist() == [[3.0, 3.0, -1.0], [-float("inf"), 0.0, 7.5]]
    assert bests.logits_ST.isnan().tolist() == [[False] * 3, [True, False, False]]


def test_misfits_are_refused():
    x, weight = torch.randn(5, 24), torch.randn(70, 24)
    tensors, rows = make(5, "cpu")
    with pytest.raises(ValueError, match="multiple of 4"):
        race_head(x, weight, rows, first_token=6)
    with pytest.raises(ValueError, match="weight"):
        race_head(x, weight[:, 1:], rows)
    for change in ({"slots_S": rows.slots_S[1:]}, {"positions_S": rows.positions_S.int()}, {"seeds_M": rows.seeds_M[::2]}):
        with pytest.raises(ValueError, match=next(iter(change))[:-2]):
            race_head(x, weight, race_rows(tensors | change, rows.wants_logits_S))
    with pytest.raises(ValueError, match="wants_logits"):
        race_head(x, weight, race_rows(tensors, rows.wants_logits_S == 1))


# --- the choice, and the build


def config_of(tile_n=64, num_stages=3, **more):
    return {"kernel": "streaming", "tile_n": tile_n, "split_k": 1, "num_stages": num_stages, "early_start": True, **more}


def test_the_table_chooses_and_what_cannot_run_stores_all_logits(fresh_loader, monkeypatch, caplog):
    weight = torch.zeros(320, 128, dtype=torch.bfloat16)
    entries = {"head_race": config_of()}
    monkeypatch.setattr(tuning, "lookup", lambda op, *rest: entries.get(op))
    assert choose_race_config(weight, 8) is None  # it lies on a CPU
    monkeypatch.setattr(loader, "can_run_on", lambda device: True)
    monkeypatch.setattr(loader, "compile_source", lambda code, name, options: b"cubin")
    assert choose_race_config(weight, 8) == config_of()
    assert choose_race_config(weight, 0) is None
    loader.warn_unserved.cache_clear()
    with caplog.at_level(logging.WARNING):
        entries["head_race"] = config_of(split_k=2)
        assert choose_race_config(weight, 8) is None
    assert "does not share its inputs" in caplog.text
    entries["head_race"] = {"kernel": "logits"}
    assert choose_race_config(weight, 8) is None
    skinny = {"kernel": "skinny", "block_n": 64, "block_k": 64, "split_k": 1, "num_warps": 4, "num_stages": 3}
    for entry, num_rows, expected in (
        (skinny, 64, skinny),
        (skinny, 65, None),
        (skinny | {"split_k": 2}, 8, None),
        (config_of(split_k=2, twin=skinny), 8, skinny),
        (config_of(split_k=2, twin={"kernel": "logits"}), 8, None),
    ):
        entries["head_race"] = entry
        assert choose_race_config(weight, num_rows) == expected
    entries["head_race"] = config_of()
    monkeypatch.setattr(head_race, "kernel_mode", lambda: "invariant")
    assert choose_race_config(weight, 8) is None


def test_nvrtc_compiles_every_tile(nvrtc):
    code = (loader.SOURCE_DIR / "streaming_linear.cu").read_bytes()
    for rows, tile, float16 in ((8, 64, 0), (128, 128, 1), (16, 192, 0), (64, 256, 1)):
        macros = {"ROWS": rows, "TILE": tile, "GATED": 0, "ONE_RING": 1, "FLOAT16": float16, "RACE": 1}
        options = ["--gpu-architecture=sm_90a", "-std=c++17", *(f"-D{name}={value}" for name, value in macros.items())]
        assert loader.compile_source(code, "streaming_linear.cu", options).startswith(b"\x7fELF")


# --- on a GPU


def layer(num_rows, vocab, num_inputs, dtype):
    generator = torch.Generator("cuda").manual_seed(num_rows)
    x = torch.randn(num_rows, num_inputs, device="cuda", generator=generator).to(dtype)
    weight = torch.randn(vocab, num_inputs, device="cuda", generator=generator) * 3 / num_inputs**0.5
    return x, weight.to(dtype)


def all_logits(x, weight, rows, config):
    """The kernel's own, with the bits that race."""
    everyone = RaceRows(rows.temperature_M, rows.seeds_M, rows.slots_S, rows.positions_S, torch.ones_like(rows.slots_S))
    return race_head_by(x, weight, everyone, config).logits_SV


def assert_race_is_right(num_rows, vocab, num_inputs, dtype, config, *, first_token=0):
    x, weight = layer(num_rows, vocab, num_inputs, dtype)
    tensors, rows = make(num_rows, "cuda")
    logits = all_logits(x, weight, rows, config)
    assert_close(logits, linear_ref(x, weight, out_dtype=torch.float32))
    expected = tile_bests_ref(logits, rows, tile=config["tile_n"], first_token=first_token)
    nan = float("nan")
    bests = type(expected)(
        torch.full_like(expected.scores_ST, nan),
        torch.full_like(expected.tokens_ST, -1),
        torch.full_like(expected.logits_ST, nan),
        expected.tile,
    )
    scores = HeadScores(torch.full((num_rows + 2, vocab), nan, device="cuda")[1:-1], bests)
    launch_race(x, weight, rows, scores, config, first_token=first_token)
    wanted = rows.wants_logits_S == 1
    assert torch.equal(scores.logits_SV[wanted], logits[wanted])
    assert scores.logits_SV[~wanted].isnan().all()  # not stored
    assert bests.scores_ST[wanted].isnan().all()
    torch.testing.assert_close(bests.scores_ST[~wanted], expected.scores_ST[~wanted], rtol=3e-6, atol=3e-5)
    same = bests.tokens_ST == expected.tokens_ST
    greedy = (rows.temperature_M[rows.slots_S] == 0) & ~wanted
    assert same[greedy].all()
    # Scores that tie within float32 rounding may fall either way.
    assert (~same[~wanted]).sum() <= 1 + same[~wanted].numel() // 1000
    assert torch.equal(bests.logits_ST[~wanted][same[~wanted]], expected.logits_ST[~wanted][same[~wanted]])
    if first_token == 0:
        drawn, of_logits = sample(scores.logits_SV, **tensors, bests=bests), sample(logits, **tensors)
        assert (drawn.tokens_S != of_logits.tokens_S).sum() <= num_rows // 100
        assert torch.equal(drawn.logits_S, logits.gather(1, drawn.tokens_S[:, None])[:, 0])


@pytest.mark.gpu
def test_on_a_gpu_one_tile_and_one_step():
    """The smallest there is, for whoever looks for a fault."""
    assert_race_is_right(8, 64, 64, torch.bfloat16, config_of(num_stages=2))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 2, 5, 8, 16, 31, 64, 100, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [4096, 5003])
def test_on_a_gpu_it_equals_the_reference(num_rows, dtype, vocab):
    for config in (config_of(64), config_of(128)):
        assert_race_is_right(num_rows, vocab, 1000, dtype, config)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [3, 32, 128])
@pytest.mark.parametrize("tile_n", TILES)
def test_on_a_gpu_every_tile_is_right(tile_n, num_rows):
    for config in (config_of(tile_n, num_stages=2), config_of(tile_n, num_stages=3, x_stages=2)):
        assert unfit_sizes(config, num_rows, 512, race=True) is None
        assert_race_is_right(num_rows, 2 * tile_n, 512, torch.bfloat16, config)
        assert_race_is_right(num_rows, 3331, 512, torch.bfloat16, config, first_token=75968)


@pytest.mark.gpu
def test_on_a_gpu_a_row_that_is_not_finite_spoils_no_other():
    x, weight = layer(9, 3000, 512, torch.bfloat16)
    tensors, rows = make(9, "cuda")
    tensors["slots_S"].copy_(torch.tensor([0, 1, 3, 6, 7, 9, 2, 5, 8]))
    rows.wants_logits_S.copy_(FILTERED.cuda()[rows.slots_S % len(SAMPLING)])
    fine = race_head_by(x, weight, rows, config_of())
    expected = sample(fine.logits_SV, **tensors, bests=fine.bests)
    x[1], x[3], x[6] = float("nan"), float("inf"), float("nan")
    broken = race_head_by(x, weight, rows, config_of())
    drawn = sample(broken.logits_SV, **tensors, bests=broken.bests)
    others = [0, 2, 4, 5, 7, 8]
    assert torch.equal(drawn.tokens_S[others], expected.tokens_S[others])
    assert not drawn.logits_S[[1, 3, 6]].isfinite().any()
    assert drawn.logits_S[others].isfinite().all()


@pytest.mark.gpu
def test_on_a_gpu_a_captured_head_follows_its_rows():
    """Wishes, parameters and inputs of a graph change between replays."""
    x, weight = layer(16, 20000, 1024, torch.bfloat16)
    tensors, rows = make(16, "cuda")

    def step():
        scores = race_head_by(x, weight, rows, config_of(128))
        return scores, sample(scores.logits_SV, **tensors, bests=scores.bests)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores, captured = step()
    for replay in range(6):
        x.copy_(torch.randn_like(x))
        tensors["slots_S"].copy_(torch.randperm(NUM_SLOTS)[:16])
        tensors["positions_S"].random_(2**40)
        filtered = FILTERED.cuda()[rows.slots_S % len(SAMPLING)]
        wants_all = replay % 3 == 2  # a step with a rule
        rows.wants_logits_S.copy_(filtered | wants_all)
        graph.replay()
        logits = all_logits(x, weight, rows, config_of(128))
        wanted = rows.wants_logits_S == 1
        assert torch.equal(scores.logits_SV[wanted], logits[wanted])
        if not wants_all:
            assert (captured.tokens_S != sample(logits, **tensors).tokens_S).sum() == 0
