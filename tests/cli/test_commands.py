"""Commands against a real server in this process, as a shell would run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_engine import expected_tokens
from pilotfish.cli import main as cli
from pilotfish.client import Client
from small_model import save_tiny_llama
from small_server import SmallServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    with SmallServer(tmp_path_factory.mktemp("model")) as running:
        yield running


def test_generate_prints_the_text(server: SmallServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--address", server.address, "--max-tokens", "9", "ab"]) == 0
    tokenizer = server.tokenizer
    assert capsys.readouterr().out == tokenizer.decode(expected_tokens(tokenizer.encode("ab"), 9)) + "\n"


def test_generate_file_keeps_the_order_and_reports_each_error(server: SmallServer, tmp_path, capsys) -> None:
    (tmp_path / "prompts.txt").write_text("ab\n\ncde\n")
    arguments = ["generate", "--address", server.address, "--max-tokens", "5", "--file", str(tmp_path / "prompts.txt")]
    assert cli.main(arguments) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["ab", "", "cde"]
    assert rows[1]["error"]["code"] == "invalid_request"
    tokenizer = server.tokenizer
    assert rows[2]["text"] == tokenizer.decode(expected_tokens(tokenizer.encode("cde"), 5))


def test_chat_answers_one_question_from_a_pipe(server: SmallServer) -> None:
    command = [sys.executable, "-m", "pilotfish.cli.main", "chat", "--address", server.address, "--max-tokens", "6"]
    done = subprocess.run(command, input="Hi", capture_output=True, text=True, timeout=60, check=True)
    tokenizer = server.tokenizer
    assert done.stdout == tokenizer.decode(expected_tokens(tokenizer.encode("<user>Hi\n<assistant>"), 6)) + "\n"


def test_status_as_text_and_as_json(server: SmallServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "--address", server.address]) == 0
    text = capsys.readouterr().out
    assert "replica-0: ready" in text
    assert "OpenAI's: " in text
    assert "drift 0 sequences, 0 tokens, 0 blocks" in text
    assert cli.main(["status", "--address", server.address, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["replicas"][0]["state"] == "ready"


def test_explain_shows_the_scores(server: SmallServer, capsys: pytest.CaptureFixture[str]) -> None:
    with Client(server.address) as client:
        client.generate("abc", max_tokens=3, request_id="why")
    assert cli.main(["explain", "--address", server.address, "why"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(("why#0~", "why~"))
    assert "goes to replica-0" in text
    assert text.rstrip().endswith("chosen")
    assert cli.main(["explain", "--address", server.address, "--json", "why"]) == 0
    (decision,) = json.loads(capsys.readouterr().out)
    assert decision["scores"][0]["replica"] == decision["replica"] == "replica-0"
    assert cli.main(["explain", "--address", server.address, "nobody"]) == 1
    assert "no choice is kept for 'nobody'" in capsys.readouterr().err


def test_env_reports_versions_kernels_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["env", "--json"])
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert {"python", "torch", "ray", "memory", "GPUs", "kernels on cpu", "cache"} <= set(facts)


def test_local_generate_and_check_model_on_a_tiny_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(save_tiny_llama(tmp_path / "tiny"))
    assert cli.main(["generate", "--local", model, "--temperature", "0", "--max-tokens", "4", "ab"]) == 0
    assert capsys.readouterr().out.strip()
    assert cli.main(["check-model", model]) == 0
    assert capsys.readouterr().out.count("ok ") == 5
    weights = tmp_path / "tiny" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 8)
    assert cli.main(["check-model", model]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_replay_prints_figures_and_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"time_ms": 5 * i, "token_ids": [*range(100), i], "output_tokens": 4} for i in range(10)]
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["replay", str(tmp_path / "trace.jsonl"), "--replicas", "2", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["num_requests"], figures["num_failed"]) == (10, 0)
    assert figures["hit_rate"] > 0.7
    assert cli.main(["replay", str(tmp_path / "trace.jsonl"), "--replicas", "2", "--explain", "3"]) == 0
    assert "r3: 101 tokens, 4 more expected, goes to replica-0" in capsys.readouterr().out
    assert cli.main(["replay", str(tmp_path / "nowhere")]) == 1
    assert "cannot read the trace" in capsys.readouterr().err
