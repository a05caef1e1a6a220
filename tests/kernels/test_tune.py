"""The tuner: which configs it tries, that it keeps the fastest right one, and, on a GPU, the table it writes."""

import json
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
from pilotfish.kernels import tune
from pilotfish.kernels.cuda import loader
from pilotfish.kernels.skinny_linear import MAX_SKINNY_ROWS, fits, fits_race
from pilotfish.kernels.tall_linear import TALL_CONFIGS
from pilotfish.kernels.tune import (
    chosen_layer_cases,
    chosen_linear_cases,
    chosen_moe_cases,
    chosen_route_cases,
    configs_to_try,
    measure,
)
from pilotfish.kernels.tune_head import head_cases
from pilotfish.kernels.tune_linear import LINEAR_ROWS, ROWS, SHAPES, LinearCase, linear_cases
from pilotfish.kernels.tune_moe import moe_cases
from pilotfish.kernels.tuning import Entry, load_entries
from triton.runtime.errors import OutOfResources

SHARED_MEMORY_BYTES = 227 * 1024  # what a program may have on an H100 or H200


class Scripted:
    """A case on the CPU whose configs name the time they take and the error they make."""

    op, sizes, num_rows, read_bytes, keeps_twin = "linear", (4, 2), 3, 16, True

    def __init__(self, *configs):
        self.baseline = {"kernel": "cublas", "time_us": 10.0, "error": 0.0}
        self.configs = configs

    def candidates(self):
        return [{"kernel": "gemv", "time_us": time_us, "error": error} for time_us, error in self.configs]

    def calls(self, config, *, num_weights=None):
        def call():
            if config["error"] is None:
                raise OutOfResources(200_000, 100_000, "shared memory")
            return torch.ones(3, 4, dtype=torch.bfloat16) * (1 + config["error"])

        call.time_us = config["time_us"]
        return [call]

    def neighbour(self):
        return SimpleNamespace(time_us=3.0)


@pytest.fixture(autouse=True)
def _scripted_times(request, monkeypatch):
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(tune, "time_in_graph", lambda calls, num_replays=7: mean(call.time_us for call in calls))


@pytest.mark.parametrize(
    ("configs", "best_us"),
    [([(12.0, 0.0), (7.0, 0.0), (8.0, 0.0)], 7.0), ([(9.9, 0.0)], 10.0), ([], 10.0), ([(9.0, 4e-3), (1.0, None)], 9.0)],
)
def test_the_fastest_is_kept_if_it_saves_enough(configs, best_us):
    measured = measure(Scripted(*configs))
    entry = measured.entry
    assert measured.faults == []
    assert entry.config["time_us"] == entry.time_us == best_us
    assert (entry.baseline_us, entry.num_rows, entry.dtype) == (10.0, 4, "bfloat16")


def test_many_rows_are_timed_on_a_card_that_is_hot(monkeypatch):
    replays = []

    def time_in_graph(calls, num_replays=7):
        replays.append(num_replays)
        return mean(call.time_us for call in calls)

    monkeypatch.setattr(tune, "time_in_graph", time_in_graph)
    case = Scripted((7.0, 0.0))
    few = measure(case).entry
    assert replays == [7] * 4  # the baseline and a candidate, each with its neighbour and the neighbour alone
    replays.clear()
    case.num_rows = tune.MANY_ROWS
    assert measure(case).entry.config == few.config
    assert replays == [7, tune.HEAT_S * 1e6 / 10.0] + [30] * 4


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_a_wrong_result_is_named_and_never_kept(error):
    measured = measure(Scripted((1.0, error), (8.0, 0.0)))
    assert measured.entry.time_us == 8.0
    assert len(measured.faults) == 1
    assert "is off by" in measured.faults[0]


STREAMING = {"kernel": "streaming", "time_us": 5.0, "error": 0.0}


def test_a_streaming_config_names_its_twin_where_the_op_looks_for_one():
    case = Scripted()
    slower = {"kernel": "gemv", "time_us": 7.0, "error": 0.0}
    assert measure(case, [STREAMING, slower]).entry.config == {**STREAMING, "twin": slower}
    case.keeps_twin = False
    assert measure(case, [STREAMING, slower]).entry.config == STREAMING


def test_of_some_kernels_only_beside_what_the_table_has():
    case, twin = Scripted((7.0, 0.0), (8.0, 0.0)), {"kernel": "skinny", "time_us": 9.0, "error": 0.0}
    known = [
        Entry(op="linear", dtype="bfloat16", sizes=(4, 2), num_rows=rows, config={**STREAMING, "twin": twin}) for rows in (2, 4)
    ]
    assert configs_to_try(case, ["streaming"], known) == [STREAMING, twin]
    assert configs_to_try(case, ["gemv"], known) == [STREAMING, twin, *case.candidates()]
    assert configs_to_try(case, ["tall"], []) == []
    assert configs_to_try(case, None, known) == case.candidates()


def test_candidates_are_within_the_limits_of_the_kernels_and_of_shared_memory():
    for case in linear_cases(SHAPES, [], ROWS) + linear_cases(SHAPES, [], ROWS, num_ranks=2):
        configs = case.candidates()
        assert configs or case.num_rows > MAX_SKINNY_ROWS
        assert len({tuple(config.items()) for config in configs}) == len(configs)
        for config in configs:
            assert fits(config, case.num_rows, case.sizes[1])
            if config["kernel"] == "skinny":
                weight_rows = config["block_n"] * (2 if case.op == "gated_linear" else 1)
                stage_bytes = 2 * config["block_k"] * (weight_rows + max(case.num_rows, 16))
                assert stage_bytes * config["num_stages"] <= SHARED_MEMORY_BYTES


def test_layers_of_many_rows_are_measured_with_the_kernel_for_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for case in linear_cases(SHAPES, [], (512, 8192)):
        assert configs_to_try(case, ["tall"], []) == ([] if case.op == "linear_float32" else list(TALL_CONFIGS))
    assert {case.num_rows for case in linear_cases(SHAPES, [], ROWS) if configs_to_try(case, ["tall"], [])} == set()


def test_what_comes_before_experts_is_measured_once_for_models_that_share_it():
    cases = chosen_route_cases(tune.argparse.Namespace(shapes=None, nk=[], rows=[1, 8, 1024]))
    assert [(case.sizes, case.num_rows) for case in cases] == [((128, 8, 2048), 1), ((128, 8, 2048), 8)]


def test_heads_are_measured_with_what_can_race(monkeypatch):
    monkeypatch.setattr(loader, "can_run_on", lambda device: True)
    cases = head_cases(SHAPES, [1, 128, 256], num_ranks=2)
    assert [case.sizes for case in cases] == [size for k in (4096, 1024, 2048) for size in [(75968, k)] * 2]
    for case in cases:
        configs = case.candidates()
        kernels = {config["kernel"] for config in configs}
        assert kernels == ({"skinny", "streaming"} if case.num_rows == 1 else {"streaming"})
        assert all(fits_race(config, case.num_rows, case.sizes[1]) for config in configs)


def test_a_layer_that_models_share_is_measured_once():
    cases = linear_cases(["qwen3-8b"], [(4096, 4096), (64, 32)], [1, 8])
    assert len(set(cases)) == len(cases) == 2 * (len(SHAPES["qwen3-8b"]) + 1)
    assert LinearCase("linear", (64, 32), 8) in cases


def test_ranks_share_the_layers():
    sizes = [case.sizes for case in linear_cases(["qwen3-8b", "qwen3-30b-a3b"], [], [1], num_ranks=2)]
    assert sizes[:5] == [(3072, 4096), (4096, 2048), (12288, 4096), (4096, 6144), (75968, 4096)]
    assert sizes[5:] == [(2560, 2048), (2048, 2048), (128, 2048), (75968, 2048)]
    with pytest.raises(ValueError, match="5 ranks do not share the 6144 outputs"):
        linear_cases(["qwen3-8b"], [], [1], num_ranks=5)


def parse(*argv):
    parser = tune.argparse.ArgumentParser()
    tune.add_case_arguments(parser)
    args = parser.parse_args(argv)
    return [*chosen_linear_cases(args), *chosen_moe_cases(args)]


def test_arguments(capsys):
    assert parse("--nk", "64x32", "--rows", "1,8") == [LinearCase("linear", (64, 32), rows) for rows in (1, 8)]
    assert parse("--shapes", "qwen3-8b", "--rows", "4") == linear_cases(["qwen3-8b"], [], [4])
    assert parse("--shapes", "qwen3-30b-a3b", "--rows", "4")[-2:] == moe_cases(["qwen3-30b-a3b"], [4])
    assert parse("--rows", "4", "--tensor-parallel", "2") == [
        *linear_cases(SHAPES, [], [4], num_ranks=2),
        *moe_cases(SHAPES, [4], num_ranks=2),
    ]
    assert parse() == [*linear_cases(SHAPES, [], LINEAR_ROWS), *moe_cases(SHAPES)]
    for wrong in (["--nk", "64"], ["--shapes", "qwen9"]):
        with pytest.raises(SystemExit):
            parse(*wrong)
        assert "is not" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_it_writes_a_table(tmp_path, capsys):
    path = tmp_path / "table.json"
    assert tune.main(["--nk", "512x256", "--rows", "1,8", "--out", str(path), "--processes", "2"]) == 0
    entries = load_entries(path)
    assert [(entry.op, entry.sizes, entry.num_rows) for entry in entries] == [("linear", (512, 256), rows) for rows in (1, 8)]
    assert all(0 < entry.time_us <= entry.baseline_us for entry in entries)
    assert [json.loads(line)["rows"] for line in capsys.readouterr().out.splitlines()] == [1, 8]


def test_layers_are_those_of_the_shapes_and_read_what_their_rows_choose():
    cases = chosen_layer_cases(tune.argparse.Namespace(shapes=None, nk=[], rows=[1, 8, 64], tensor_parallel=1))
    assert {(case.sizes, case.num_rows) for case in cases} == {
        (sizes, num_rows)
        for sizes in ((4096, 4096, 12288, 1, 1, 6144), (1024, 2048, 3072, 1, 1, 4096), (2048, 4096, 768, 128, 8, 5120))
        for num_rows in (1, 8)
    }
    read = {case.num_rows: case.read_bytes for case in cases if case.sizes[3] == 128}
    others = 2 * 2048 * (4096 + 128 + 5120)
    assert read[1] == others + 2 * 8 * 3 * 2048 * 768
    assert read[8] == pytest.approx(others + 2 * 51.6 * 3 * 2048 * 768, rel=1e-3)
    assert not chosen_layer_cases(tune.argparse.Namespace(shapes=None, nk=[], rows=None, tensor_parallel=2))


def test_a_layer_has_candidates_where_x_leaves_room_for_weights(monkeypatch):
    monkeypatch.setattr(loader, "can_run_on", lambda device: True)
    cases = chosen_layer_cases(tune.argparse.Namespace(shapes=None, nk=[], rows=None, tensor_parallel=1))
    without = [case for case in cases if not case.candidates()]
    assert [(case.sizes[2], case.num_rows) for case in without] == [(12288, 8)]
