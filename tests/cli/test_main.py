"""The command line's frame: help, exit codes, errors as one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pilotfish.cli import main as cli
from pilotfish.common.api_keys import KeyRing
from pilotfish.common.config import ServeConfig, load_toml, parse


def test_help_of_every_command_is_quick_and_names_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0
        assert f"pilotfish {command}" in capsys.readouterr().out


def test_help_pulls_neither_torch_nor_ray() -> None:
    script = "import sys\nfrom pilotfish.cli.main import main\ntry: main(['chat', '--help'])\nexcept SystemExit: pass\n"
    script += "print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(("argv", "hint"), [(["serv"], "invalid choice"), ([], "required"), (["chat", "--bogus"], "--bogus")])
def test_a_wrong_command_line_exits_2_and_says_how_to_get_help(argv, hint, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert hint in error
    assert "--help" in error


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["status", "--address", "127.0.0.1:1"], "cannot reach a pilotfish server at 127.0.0.1:1"),
        (["chat", "--address", "http://x", "hi"], "host:port"),
        (["generate", "--address", "127.0.0.1:1", "hi"], "cannot reach"),
        (["generate"], "a prompt or --file"),
        (["generate", "--file", "/nonexistent"], "cannot read /nonexistent"),
        (["pull", "smollm3"], "smollm2-135m"),
        (["pull"], "smollm2-135m"),
        (["check-model", "no-such-model"], "Tried, in order"),
        (["serve"], "which model?"),
        (["up"], "which model?"),
        (["keys", "new", "a b"], "a tenant's name"),
        (["keys", "new", "anonymous"], "not 'anonymous'"),
        (["up", "m", "--placement", "spread", "--tensor-parallel", "0"], "tensor_parallel"),
        (["serve", "m", "--block-size", "20"], "power of two"),
        (["serve", "m", "--config", "/nonexistent.toml"], "cannot read the configuration"),
    ],
)
def test_a_failure_exits_1_with_one_reason_on_stderr(argv, hint, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 1
    captured = capsys.readouterr()
    assert hint in captured.err
    assert captured.err.startswith(f"pilotfish {argv[0]}: ")
    assert "Traceback" not in captured.err


def test_every_field_of_the_configuration_has_a_flag_with_help() -> None:
    from pilotfish.cli import config_flags

    parser = cli.build_parser("serve")
    args = parser.parse_args(["serve", "m", "--no-prefix-caching", "--grpc-port", "0", "--kv-memory-fraction", "0.25"])
    config = config_flags.serve_config(args)
    assert isinstance(config, ServeConfig)
    assert (config.engine.prefix_caching, config.gateway.grpc_port, config.engine.kv_memory_fraction) == (False, 0, 0.25)
    for section in config_flags._SECTIONS.values():
        fields = set(section.__dataclass_fields__)
        assert set(config_flags._attribute_docs(section)) >= fields - {"model"}, section


def test_flags_win_over_the_file(tmp_path) -> None:
    from pilotfish.cli import config_flags

    path = tmp_path / "serve.toml"
    path.write_text('[model]\nmodel = "a"\n[engine]\nmax_num_seqs = 3\nmax_num_batched_tokens = 99\n')
    args = cli.build_parser("serve").parse_args(["serve", "--config", str(path), "--max-num-seqs", "5"])
    config = config_flags.serve_config(args)
    assert (config.model.model, config.engine.max_num_seqs, config.engine.max_num_batched_tokens) == ("a", 5, 99)


def test_a_new_key_is_shown_with_the_lines_that_let_it_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["keys", "new", "acme"]) == 0
    out = capsys.readouterr().out
    assert cli.main(["keys", "new", "acme"]) == 0
    assert capsys.readouterr().out != out
    key = next(line.strip() for line in out.splitlines() if line.startswith("  pf-"))
    section = out[out.index("  [tenants") :].replace("  ", "")
    (tmp_path / "serve.toml").write_text('[model]\nmodel = "m"\n' + section)
    config = parse(ServeConfig, load_toml(tmp_path / "serve.toml"))
    assert KeyRing({"acme": config.tenants["acme"].keys}).owner(key) == "acme"
