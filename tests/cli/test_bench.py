"""`pilotfish bench`: the arithmetic of its limits by hand, its rows on a tiny model, and a real server under load."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pilotfish.cli import bench_plot
from pilotfish.cli import main as cli
from pilotfish.cli.bench_roofline import Machine, Roofline
from pilotfish.cli.bench_serve import percentile
from pilotfish.models.dummy_shapes import SHAPES
from processes import children_end
from small_server import SmallServer

H200 = Machine(read_bytes_per_s=4.28e12, flop_per_s=790e12)
TINY = ("--input-len", "24", "--output-len", "6", "--device", "cpu", "--num-threads", "1")


def h200_roofline(shape: str) -> Roofline:
    return Roofline(shape=SHAPES[shape], machine=H200, weight_bytes=2, kv_bytes=2)


@pytest.mark.parametrize(
    ("shape", "batch", "output_len", "limit_ms"),
    [
        ("qwen3-8b", 1, 512, 3.55),
        ("qwen3-8b", 8, 512, 3.74),
        ("qwen3-8b", 32, 512, 4.4),
        ("qwen3-8b", 128, 512, 6.9),
        ("qwen3-30b-a3b", 1, 512, 1.43),
        ("qwen3-30b-a3b", 8, 512, 6.1),
        ("qwen3-30b-a3b", 32, 512, 12.6),
        ("qwen3-30b-a3b", 128, 512, 16.4),
        ("qwen3-0.6b", 1, 256, 0.29),
        ("qwen3-0.6b", 32, 256, 0.83),
        ("qwen3-0.6b", 128, 256, 2.4),
    ],
)
def test_the_limits_are_those_computed_by_hand(shape: str, batch: int, output_len: int, limit_ms: float) -> None:
    limit_s = h200_roofline(shape).decode_step_s(batch, context=512 + output_len / 2)
    assert limit_s * 1e3 == pytest.approx(limit_ms, rel=0.04)


def test_the_limit_of_one_step_is_bytes_over_bandwidth_to_the_byte() -> None:
    # q and output 4096 x 4096, k and v 1024 x 4096, three MLP matrices of 4096 x 12288, in each of 36 layers; the head.
    layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 12288
    num_bytes = 2 * (36 * layer + 151936 * 4096) + 768 * 36 * 2 * 8 * 128 * 2
    assert h200_roofline("qwen3-8b").decode_step_s(1, context=768) == pytest.approx(num_bytes / 4.28e12, rel=1e-9)


def test_the_limits_of_prefill_and_of_a_whole_run() -> None:
    roofline = h200_roofline("qwen3-8b")
    # 6.946e9 weights in the layers: 65536 tokens need 9.10e14 FLOP in them and 9.9e12 in attention.
    assert roofline.prefill_s(128, length=512) == pytest.approx(1.165, rel=0.01)
    assert roofline.run_s(1024, input_len=512, output_len=512, concurrency=512) == pytest.approx(34, rel=0.03)


def test_experts_touched_are_expected_under_random_routing() -> None:
    roofline = h200_roofline("qwen3-30b-a3b")
    assert roofline.experts_touched(1) == pytest.approx(8)
    assert roofline.experts_touched(32) == pytest.approx(128 * (1 - (120 / 128) ** 32))
    assert h200_roofline("qwen3-8b").experts_touched(32) == 0


@pytest.mark.parametrize("shape", ["tiny", "tiny-moe"])
def test_latency_prints_a_row_for_each_batch(shape: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    argv = ["bench", "latency", "--shape", shape, "--batch-sizes", "1,3", "--json-out", str(out), *TINY]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in printed.splitlines()]
    assert [row["batch"] for row in rows] == [1, 3]
    assert out.read_text() == printed
    for row in rows:
        assert (row["model"], row["device"], row["input_len"], row["output_len"]) == (f"dummy:{shape}", "cpu", 24, 6)
        assert row["start_s"] > row["ttft_s"] > 0
        assert row["decode_tok_s"] == pytest.approx(row["batch"] / row["tpot_ms"] * 1e3, rel=1e-4)
        assert row["fraction"] == pytest.approx(row["roofline_tpot_ms"] / row["tpot_ms"], rel=1e-4)
        assert 1e-4 < row["read_tb_s"] < 100
    assert rows[1]["roofline_tpot_ms"] > rows[0]["roofline_tpot_ms"] > 0


def test_ranks_are_processes_that_end_with_the_bench(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "latency", "--shape", "tiny-moe", "--batch-sizes", "2", *TINY]
    assert cli.main([*argv, "--tensor-parallel", "2", "--expert-parallel"]) == 0
    captured = capsys.readouterr()
    row = json.loads(captured.out)
    assert (row["tensor_parallel"], row["expert_parallel"]) == (2, True)
    assert "on each of 2 ranks" in captured.err
    assert children_end()


def test_data_ranks_share_the_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "throughput", "--shape", "tiny-moe", "--num-prompts", "5", "--repeat", "1", *TINY]
    assert cli.main([*argv, "--data-parallel", "2", "--expert-parallel"]) == 0
    captured = capsys.readouterr()
    row = json.loads(captured.out)
    assert (row["tensor_parallel"], row["data_parallel"], row["max_num_seqs"]) == (1, 2, 3)
    assert row["output_tok_s"] * row["elapsed_s"] == pytest.approx(5 * 6, rel=1e-4)
    assert children_end()
    assert cli.main([*argv, "--data-parallel", "2"]) == 1
    assert "data_parallel needs expert_parallel" in capsys.readouterr().err


def test_each_rank_has_its_share_of_the_limit() -> None:
    one, two = h200_roofline("qwen3-8b"), replace(h200_roofline("qwen3-8b"), num_ranks=2)
    for batch in (1, 128):
        assert two.decode_step_s(batch, context=768) == pytest.approx(one.decode_step_s(batch, context=768) / 2)
    assert two.prefill_s(128, length=512) == pytest.approx(one.prefill_s(128, length=512) / 2)
    many = replace(one, num_ranks=16)  # of 8 kv heads
    assert many.decode_step_s(1, context=768) > one.decode_step_s(1, context=768) / 16
    # Every rank reads the whole router.
    one, two = h200_roofline("qwen3-30b-a3b"), replace(h200_roofline("qwen3-30b-a3b"), num_ranks=2)
    router_s = 48 * 2048 * 128 * 2 / 4.28e12
    assert two.decode_step_s(1, context=0) == pytest.approx((one.decode_step_s(1, context=0) + router_s) / 2)


def test_experts_are_counted_in_what_was_generated(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "latency", "--shape", "tiny-moe", "--batch-sizes", "1,6", "--count-experts", *TINY]
    assert cli.main(argv) == 0
    *_, one, six = map(json.loads, capsys.readouterr().out.splitlines())
    assert (one["batch"], one["experts_touched"], one["experts_expected"]) == (1, 2, 2)  # top 2
    assert six["batch"] == 6
    assert 2 < six["experts_touched"] <= 8
    assert six["experts_expected"] == pytest.approx(8 * (1 - 0.75**6), rel=1e-4)
    assert cli.main(["bench", "latency", "--shape", "tiny", "--batch-sizes", "1", "--count-experts", *TINY]) == 1
    assert "--count-experts: dummy:tiny has none" in capsys.readouterr().err


def test_throughput_counts_every_token(capsys: pytest.CaptureFixture[str]) -> None:
    """More prompts than the engine runs at a time."""
    argv = ["bench", "throughput", "--shape", "tiny", "--num-prompts", "9", "--max-num-seqs", "4", "--repeat", "2", *TINY]
    assert cli.main(argv) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["num_prompts"], row["max_num_seqs"], row["num_preemptions"]) == (9, 4, 0)
    assert row["output_tok_s"] * row["elapsed_s"] == pytest.approx(9 * 6, rel=1e-4)
    assert row["total_tok_s"] * row["elapsed_s"] == pytest.approx(9 * (24 + 6), rel=1e-4)
    assert row["roofline_elapsed_s"] > 0


def test_more_requests_than_an_engine_holds_are_fed_as_it_frees_places(monkeypatch, capsys) -> None:
    monkeypatch.setattr("pilotfish.workers.engine.MAX_LIVE_REQUESTS", 3)
    assert cli.main(["bench", "throughput", "--shape", "tiny", "--num-prompts", "8", *TINY]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["output_tok_s"] * row["elapsed_s"] == pytest.approx(8 * 6, rel=1e-4)


def test_a_batch_that_does_not_fit_is_refused_with_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "latency", "--shape", "tiny", "--batch-sizes", "8", "--num-kv-blocks", "4", *TINY]
    assert cli.main(argv) == 1
    assert "a batch of 8 needs 16 KV blocks" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_serve_measures_a_server_from_its_clients(protocol: str, tmp_path: Path) -> None:
    if protocol == "http":
        pytest.importorskip("aiohttp")
    with SmallServer(tmp_path) as server:
        row = run_serve(
            server, protocol, tmp_path / "a", "--request-rate", "200", "--slo-ttft-ms", "60000", "--slo-tpot-ms", "60000"
        )
        assert (row["completed"], row["rejects"], row["errors"]) == (6, 0, 0)
        assert row["output_tok_s"] * row["elapsed_s"] == pytest.approx(6 * 8, rel=1e-4)
        assert row["goodput_req_s"] * row["elapsed_s"] == pytest.approx(6, rel=1e-4)
        for name in ("ttft", "tpot", "itl"):
            assert 0 <= row[f"{name}_ms_p50"] <= row[f"{name}_ms_p99"]
        assert row["ttft_ms_p50"] > 0
        row = run_serve(server, protocol, tmp_path / "b", "--slo-ttft-ms", "0.001")
        assert (row["completed"], row["goodput_req_s"], row["request_rate"]) == (6, 0, "inf")


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_serve_counts_what_a_full_server_refuses(protocol: str, tmp_path: Path) -> None:
    if protocol == "http":
        pytest.importorskip("aiohttp")
    with SmallServer(tmp_path, max_queued_requests=1, max_num_seqs=1, step_s=0.02) as server:
        row = run_serve(server, protocol, tmp_path / "row")
    assert row["completed"] >= 1
    assert row["rejects"] >= 1
    assert (row["completed"] + row["rejects"], row["errors"]) == (6, 0)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_serve_exits_1_when_requests_fail(protocol: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With seed 1 two of the four prompts are a token outside the server's vocabulary of 97."""
    if protocol == "http":
        pytest.importorskip("aiohttp")
    argv = ["bench", "serve", "--num-prompts", "4", "--input-len", "1", "--output-len", "8", "--vocab-size", "194"]
    with SmallServer(tmp_path) as server:
        address = server.address if protocol == "grpc" else server.http_address
        assert cli.main([*argv, "--seed", "1", "--protocol", protocol, "--address", address]) == 1
    captured = capsys.readouterr()
    row = json.loads(captured.out)
    assert (row["completed"], row["rejects"], row["errors"]) == (2, 0, 2)
    assert "outside this model's vocabulary" in captured.err


def run_serve(server: SmallServer, protocol: str, out: Path, *options: str) -> dict[str, Any]:
    address = server.address if protocol == "grpc" else server.http_address
    argv = ["bench", "serve", "--protocol", protocol, "--address", address, "--num-prompts", "6", "--input-len", "12"]
    assert cli.main([*argv, "--output-len", "8", "--vocab-size", "97", "--json-out", str(out), *options]) == 0
    row: dict[str, Any] = json.loads(out.read_text())
    return row


@pytest.mark.parametrize(
    ("protocol", "message"),
    [("grpc", "cannot reach a pilotfish server at 127.0.0.1:1"), ("http", "no server answers at http://127.0.0.1:1/v1")],
)
def test_serve_says_that_no_server_answers(protocol: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if protocol == "http":
        pytest.importorskip("aiohttp")
    assert cli.main(["bench", "serve", "--protocol", protocol, "--address", "127.0.0.1:1"]) == 1
    assert message in capsys.readouterr().err


def test_percentiles_lie_between_the_nearest_values() -> None:
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile([1, 2], 99) == pytest.approx(1.99)
    assert percentile([7], 99) == 7
    assert percentile([], 50) is None


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["latency"], "--shape --model"),
        (["latency", "--shape", "tiny", "--batch-sizes", "1,0"], "at least 1"),
        (["throughput", "--shape", "tiny", "--output-len", "1"], "at least 2"),
        (["throughput", "--shape", "tinny"], "invalid choice"),
        (["serve", "--request-rate", "0"], "above 0"),
    ],
)
def test_a_wrong_command_line_exits_2_before_anything_starts(argv, hint, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *argv])
    assert ended.value.code == 2
    assert hint in capsys.readouterr().err


def test_what_cannot_be_written_is_said_before_anything_starts(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "latency", "--shape", "tiny", "--json-out", "/nonexistent/rows"]) == 1
    assert "cannot write /nonexistent/rows" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", "latency", "--shape", "tiny", "--plot", "out.png"]) == 1
    assert "pip install 'pilotfish[bench]'" in capsys.readouterr().err


def test_latency_needs_neither_ray_nor_a_web_framework() -> None:
    """The whole command in a process where they cannot be imported."""
    blocked = "for name in ('ray', 'fastapi', 'starlette', 'pydantic', 'uvicorn', 'grpc'): sys.modules[name] = None\n"
    argv = ["bench", "latency", "--shape", "tiny", "--batch-sizes", "1", *TINY]
    script = f"import sys\n{blocked}from pilotfish.cli.main import main\nsys.exit(main({argv!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["batch"] == 1


def test_plots_are_drawn(tmp_path: Path) -> None:
    facts = {"model": "m", "device": "d", "input_len": 1, "output_len": 2}
    latency = [({**facts, "batch": batch, "tpot_ms": 2.0 * batch, "roofline_tpot_ms": 1.0}, {}) for batch in (1, 8)]
    throughput = [({**facts, "elapsed_s": 2.0, "output_tok_s": 5.0}, {"token_times": ((0.5, 4), (2.0, 6))})]
    serve = [({"protocol": "grpc", "num_prompts": 2, "request_rate": 1.0}, {"TTFT": [3.0, 1.0], "ITL": [0.5]})]
    for workload, plotted in {"latency": latency, "throughput": throughput, "serve": serve}.items():
        path = tmp_path / f"{workload}.png"
        bench_plot.draw(workload, plotted, str(path))
        assert path.read_bytes().startswith(b"\x89PNG")
