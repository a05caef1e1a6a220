import pytest
from pilotfish.common.config import EngineConfig, ServeConfig, load_toml, parse
from pilotfish.common.errors import ConfigError

LINE = "0" * 16 + ":" + "0" * 64


def test_sections_become_frozen_configs(tmp_path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text('[model]\nmodel = "m"\n[engine]\nkv_memory_fraction = 1\n[fleet]\nnum_replicas = 2\n')
    config = parse(ServeConfig, load_toml(path))
    assert (config.model.name, config.engine.kv_memory_fraction, config.fleet.num_replicas) == ("m", 1.0, 2)
    with pytest.raises(AttributeError):
        config.fleet.num_replicas = 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"model": "m"}, "engin": {}}, "did you mean 'engine'"),
        ({"model": {"model": "m"}, "engine": {"blok_size": 16}}, "did you mean 'block_size'"),
        ({"model": {"model": "m"}, "engine": {"block_size": "16"}}, "engine.block_size must be int"),
        ({"model": {"model": "m"}, "engine": {"block_size": True}}, "engine.block_size must be int"),
        ({"model": {"model": "m", "dtype": "fp8"}}, "model.dtype must be one of"),
        ({"model": "m"}, "model must be a section"),
        ({}, "model"),
        ({"model": {"model": "m"}, "engine": {"block_size": 24}}, "power of two"),
        ({"model": {"model": "m"}, "engine": {"max_num_batched_tokens": 8}}, "at least 64"),
        ({"model": {"model": "m"}, "gateway": {"grpc_port": 70000}}, "grpc_port must be in"),
        ({"model": {"model": "m"}, "fleet": {"max_replicas": 0}}, r"1 is not in \[1, 0\]"),
        ({"model": {"model": "m"}, "fleet": {"min_replicas": 2, "max_replicas": 4}}, r"1 is not in \[2, 4\]"),
        ({"model": {"model": "m"}, "fleet": {"min_replicas": 3, "max_replicas": 1}}, "is more than max_replicas"),
        ({"model": {"model": "m"}, "parallel": {"rebalance_interval_steps": 9}}, "needs expert_parallel"),
        ({"model": {"model": "m"}, "parallel": {"redundant_experts": -1}}, "at least 0"),
        (
            {"model": {"model": "m"}, "parallel": {"tensor_parallel": 2, "expert_parallel": True, "redundant_experts": 2}},
            "redundant_experts needs rebalance_interval_steps, 3000",
        ),
        ({"model": {"model": "m"}, "parallel": {"data_parallel": 2}}, "data_parallel needs expert_parallel.*num_replicas"),
        ({"model": {"model": "m"}, "tenants": 3}, r"tenants must be sections \[tenants.NAME\]"),
        ({"model": {"model": "m"}, "tenants": {"a": 3}}, "tenants.a must be a section"),
        ({"model": {"model": "m"}, "tenants": {"a": {}}}, "tenants.a has no keys.*pilotfish keys new a"),
        ({"model": {"model": "m"}, "tenants": {"a": {"keys": ["pf-secret"]}}}, "hashes .* never the keys themselves"),
        ({"model": {"model": "m"}, "tenants": {"a": {"keys": "x"}}}, "tenants.a.keys must be a list"),
        ({"model": {"model": "m"}, "tenants": {"a": {"keys": [LINE], "weight": 0}}}, "weight must be above 0"),
        ({"model": {"model": "m"}, "tenants": {"a": {"keys": [LINE], "max_requests": 0}}}, "max_requests must be at least 1"),
        ({"model": {"model": "m"}, "tenants": {"a": {"keys": [LINE]}, "anonymous": {}}}, "anonymous is who comes without"),
        ({"model": {"model": "m"}, "tenants": {"a": {"keys": [LINE]}, "b": {"keys": [LINE]}}}, "given twice, to a and b"),
        ({"model": {"model": "m"}, "parallel": {"expert_parallel": True}}, "needs tensor_parallel or data_parallel"),
    ],
)
def test_a_wrong_value_says_what_to_do(values, message) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(ServeConfig, values)


def test_a_file_that_is_not_there_or_not_toml(tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_toml(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("model = ")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_toml(tmp_path / "bad.toml")


def test_optional_values_may_be_set() -> None:
    assert parse(EngineConfig, {"num_kv_blocks": 10}).num_kv_blocks == 10


def test_tenants_are_sections_by_name(tmp_path) -> None:
    path = tmp_path / "serve.toml"
    text = '[model]\nmodel = "m"\n[tenants.acme]\nkeys = ["{}"]\nweight = 2\n[tenants.zoo]\nkeys = ["{}"]\n'
    path.write_text(text.format(LINE, "1" + LINE[1:]))
    tenants = parse(ServeConfig, load_toml(path)).tenants
    assert (tenants["acme"].weight, tenants["acme"].max_requests, tenants["acme"].keys) == (2.0, None, (LINE,))
