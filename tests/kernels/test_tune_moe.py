import pytest
import torch
from pilotfish.kernels import tune_moe, tuning
from pilotfish.kernels.cuda import loader
from pilotfish.kernels.grouped_tiles import GroupedConfig
from pilotfish.kernels.moe_config import MoeSizes, parse_config, rule, table_config
from pilotfish.kernels.moe_gemv import GemvConfig
from pilotfish.kernels.streaming_experts import StreamingConfig, shared_bytes
from pilotfish.kernels.tune import measure
from pilotfish.kernels.tune_moe import MOE_ROWS, MoeCase, moe_cases

SHARED_BYTES = 227 * 1024  # of a Hopper multiprocessor


def test_cases_cover_both_gemms_of_every_number_of_tokens():
    cases = moe_cases(["qwen3-8b", "qwen3-30b-a3b"])
    assert {(case.op, case.num_rows) for case in cases} == {
        (op, rows) for op in ("moe_gate_up", "moe_down") for rows in MOE_ROWS
    }
    assert moe_cases(["qwen3-8b"]) == []


@pytest.mark.parametrize("on_hopper", [True, False])
def test_configs_survive_the_table_and_fit_the_gpu(monkeypatch, on_hopper):
    monkeypatch.setattr(tune_moe, "_is_on_hopper", lambda: on_hopper)
    for case in [case for num_ranks in (1, 2) for case in moe_cases(["qwen3-30b-a3b"], num_ranks=num_ranks)]:
        configs = [parse_config(fields) for fields in case.candidates()]
        assert configs
        assert [table_config(config) for config in configs] == case.candidates()
        has_streaming = any(isinstance(config, StreamingConfig) for config in configs)
        assert has_streaming == (on_hopper and 2 <= case.num_rows <= 128)
        for config in [*configs, parse_config(case.baseline)]:
            if isinstance(config, GroupedConfig):
                rows = config.block_m + config.block_n * (2 if case.op == "moe_gate_up" else 1)
                assert rows * config.block_k * 2 * config.num_stages <= SHARED_BYTES
            if isinstance(config, StreamingConfig):
                assert shared_bytes(config) <= loader.MAX_SHARED_BYTES
                assert config.programs == 132 * (SHARED_BYTES // shared_bytes(config))


def test_the_tables_in_the_package_can_be_used():
    for path in tuning.TABLES.glob("*.json"):
        for entry in tuning.load_entries(path):
            if entry.op.startswith("moe"):
                parse_config(entry.config)


def test_read_bytes_are_of_the_touched_experts():
    by_rows = {case.num_rows: case.read_bytes for case in moe_cases(["qwen3-30b-a3b"]) if case.op == "moe_gate_up"}
    expert_bytes = 2 * 768 * 2048 * 2
    assert by_rows[1] == 8 * expert_bytes
    assert by_rows[8192] == 128 * expert_bytes


def test_ranks_share_the_experts_or_the_size_of_each():
    sizes = {case.sizes: case.num_expert_ranks for case in moe_cases(["qwen3-30b-a3b"], num_ranks=2)}
    assert sizes == {(64, 8, 2048, 768): 2, (128, 8, 2048, 384): 1}
    read = {case.sizes: case.read_bytes for case in moe_cases(["qwen3-30b-a3b"], [1], num_ranks=2) if case.op == "moe_gate_up"}
    assert set(read.values()) == {4 * 2 * 768 * 2048 * 2}  # half of what one token's 8 experts are


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
@pytest.mark.parametrize("num_expert_ranks", [1, 2])
def test_every_candidate_agrees_and_the_best_is_kept(op, num_tokens, num_expert_ranks):
    sizes = MoeSizes(num_tokens=num_tokens, num_choices=4, num_experts=16, hidden=512, intermediate=256)
    case = MoeCase(op, sizes, num_expert_ranks)
    measured = measure(case)
    assert measured.faults == []
    entry = measured.entry
    assert dict(entry.config) in [dict(config) for config in (*case.candidates(), case.baseline)]
    assert 0 < entry.time_us <= entry.baseline_us
    assert torch.isfinite(case.calls(entry.config, num_weights=1)[0]()).all()
