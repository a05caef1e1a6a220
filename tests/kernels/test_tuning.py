"""The tables of measured choices: what is saved is found, by its bucket of rows, and what is not is not guessed."""

import json
import logging

import pytest
import torch
from pilotfish.kernels import tuning
from pilotfish.kernels.tuning import Entry, load_entries, lookup, row_bucket, save_entries, table_path

GPU = torch.device("cuda:0")


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The path of the one table there is, of a GPU named "Some GPU"."""
    monkeypatch.setattr(tuning, "TABLES", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    tuning._table.cache_clear()
    tuning._lookup.cache_clear()
    yield table_path("Some GPU")
    tuning._table.cache_clear()
    tuning._lookup.cache_clear()


def entry(num_rows=8, kernel="skinny", op="linear", sizes=(64, 32)):
    return Entry(
        op=op, dtype="bfloat16", sizes=sizes, num_rows=num_rows, config={"kernel": kernel}, time_us=2.5, baseline_us=3.0
    )


def test_rows_go_to_the_next_power_of_two():
    assert [row_bucket(rows) for rows in (0, 1, 2, 3, 4, 5, 64, 65)] == [1, 1, 2, 4, 4, 8, 64, 128]


def test_what_was_saved_is_found(table):
    assert lookup("linear", torch.bfloat16, (64, 32), 5, GPU) is None
    save_entries(table, [entry(), entry(num_rows=1, kernel="gemv")], measured_on={"gpu": "Some GPU"})
    assert lookup("linear", torch.bfloat16, (64, 32), 5, GPU) == {"kernel": "skinny"}
    assert lookup("linear", torch.float16, (64, 32), 1, GPU) == {"kernel": "gemv"}
    assert lookup("linear", torch.float32, (64, 32), 5, GPU) is None
    assert lookup("linear", torch.bfloat16, (64, 32), 9, GPU) is None
    assert lookup("linear", torch.bfloat16, (32, 64), 5, GPU) is None
    assert lookup("gated_linear", torch.bfloat16, (64, 32), 5, GPU) is None


def test_the_largest_bucket_serves_what_is_beyond_it_where_it_is_of_many_rows(table):
    kernels = {128: "skinny", 512: "cublas", 2048: "tall"}
    save_entries(table, [entry(num_rows, kernel) for num_rows, kernel in kernels.items()], measured_on={})
    save_entries(table, [entry(256, sizes=(32, 64))], measured_on={})
    found = {rows: lookup("linear", torch.bfloat16, (64, 32), rows, GPU) for rows in (128, 200, 512, 1000, 1025, 2049, 10**6)}
    names = [config and config["kernel"] for config in found.values()]
    assert names == ["skinny", None, "cublas", None, "tall", "tall", "tall"]
    assert lookup("linear", torch.bfloat16, (32, 64), 257, GPU) is None


def test_a_gpu_without_a_table_is_named_once_with_what_makes_one(table, caplog):
    with caplog.at_level(logging.WARNING):
        for num_rows in (1, 8):
            assert lookup("linear", torch.bfloat16, (64, 32), num_rows, GPU) is None
        (record,) = caplog.records
        assert "Some GPU (some-gpu.json)" in record.message
        assert "python -m pilotfish.kernels.tune" in record.message
        save_entries(table, [entry()], measured_on={})
        assert lookup("linear", torch.bfloat16, (64, 32), 8, GPU) == {"kernel": "skinny"}
    assert len(caplog.records) == 1


def test_saving_replaces_what_it_measured_again_and_keeps_the_rest(table):
    experts = entry(op="grouped_gemm", sizes=(4, 8, 16))
    save_entries(table, [entry(), experts], measured_on={})
    save_entries(table, [entry(kernel="cublas")], measured_on={"torch": "3"})
    assert load_entries(table) == [experts, entry(kernel="cublas")]
    assert lookup("linear", torch.bfloat16, (64, 32), 8, GPU) == {"kernel": "cublas"}
    assert json.loads(table.read_text())["measured_on"] == {"torch": "3"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"entries": [{"op": "linear"}]}'])
def test_a_broken_table_is_refused(table, text):
    table.write_text(text)
    with pytest.raises(ValueError, match="not a tuning table"):
        load_entries(table)


def test_a_table_is_named_after_its_gpu():
    assert table_path("NVIDIA H200").name == "nvidia-h200.json"
    assert table_path("NVIDIA GeForce RTX 4090 (Laptop)").name == "nvidia-geforce-rtx-4090-laptop.json"


def test_the_tables_in_the_package_can_be_read():
    for path in tuning.TABLES.glob("*.json"):
        entries = load_entries(path)
        assert entries
        assert len({entry.key for entry in entries}) == len(entries)
