import pytest
import torch
from pilotfish.kernels.moe_config import MoeSizes, parse_config, rule, table_config
from pilotfish.kernels.moe_gemv import GemvConfig
from pilotfish.kernels.tune import measure
from pilotfish.kernels.tune_moe import MOE_ROWS, MoeCase, moe_cases

SHARED_BYTES = 227 * 1024  # of a Hopper multiprocessor


def test_cases_cover_both_gemms_of_every_number_of_tokens():
    cases = moe_cases(["qwen3-8b", "qwen3-30b-a3b"])
    assert {(case.op, case.num_rows) for case in cases} == {
        (op, rows) for op in ("moe_gate_up", "moe_down") for rows in MOE_ROWS
    }
    assert moe_cases(["qwen3-8b"]) == []


def test_configs_survive_the_table_and_fit_the_gpu():
    for case in moe_cases(["qwen3-30b-a3b"]):
        assert case.candidates()
        for fields in [*case.candidates(), case.baseline]:
            config = parse_config(fields)
            assert table_config(config) == fields
            if not isinstance(config, GemvConfig):
                gated = case.op == "moe_gate_up"
                rows = config.block_m + config.block_n * (2 if gated else 1)
                assert rows * config.block_k * 2 * config.num_stages <= SHARED_BYTES


def test_read_bytes_are_of_the_touched_experts():
    by_rows = {case.num_rows: case.read_bytes for case in moe_cases(["qwen3-30b-a3b"]) if case.op == "moe_gate_up"}
    expert_bytes = 2 * 768 * 2048 * 2
    assert by_rows[1] == 8 * expert_bytes
    assert by_rows[8192] == 128 * expert_bytes


@pytest.mark.parametrize("num_tokens", [1, 5, 100, 1000, 100_000])
@pytest.mark.parametrize("op", ["moe_gate_up", "moe_down"])
def test_the_rule_serves_every_number_of_tokens(op, num_tokens):
    sizes = MoeSizes(num_tokens=num_tokens, num_choices=3, num_experts=60, hidden=200, intermediate=72)
    for element_size in (2, 4):
        config = rule(op, sizes, element_size=element_size)
        assert isinstance(config, GemvConfig) == (num_tokens <= 4)


def test_an_unknown_kernel_in_a_table_is_named():
    with pytest.raises(ValueError, match="'magic'"):
        parse_config({"kernel": "magic", "block_n": 1})


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["moe_gate_up", "moe_down"])
@pytest.mark.parametrize("num_tokens", [2, 64, 1024])
def test_every_candidate_agrees_and_the_best_is_kept(op, num_tokens):
    sizes = MoeSizes(num_tokens=num_tokens, num_choices=4, num_experts=16, hidden=512, intermediate=256)
    case = MoeCase(op, sizes)
    measured = measure(case)
    assert measured.faults == []
    entry = measured.entry
    assert dict(entry.config) in [dict(config) for config in (*case.candidates(), case.baseline)]
    assert 0 < entry.time_us <= entry.baseline_us
    assert torch.isfinite(case.calls(entry.config, num_weights=1)[0]()).all()
