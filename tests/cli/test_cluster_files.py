"""cluster.yaml and docs/clusters/ against Ray's own schema, and their commands against pilotfish's own command line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from pilotfish.cli import config_flags
from pilotfish.cli.main import build_parser
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "cluster.yaml", *sorted((ROOT / "docs/clusters").glob("*.yaml"))]


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load(request.param.read_text())


def test_ray_takes_the_file(config: dict[str, Any]) -> None:
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["head_start_ray_commands"] == config["head_start_ray_commands"]


def test_all_nodes_have_the_token_and_use_it(config: dict[str, Any]) -> None:
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in command for command in commands if command != "ray stop")


def test_the_last_command_of_the_head_serves_on_as_many_nodes_as_there_are(config: dict[str, Any]) -> None:
    args = _pilotfish_up(config["head_start_ray_commands"][-1])
    assert config_flags.serve_config(args).model.model
    node_types = prepare_config(config)["available_node_types"].values()
    assert args.wait_nodes == 1 + sum(node_type.get("min_workers", 0) for node_type in node_types)


def test_the_command_in_slurm_md_parses() -> None:
    text = (ROOT / "docs/clusters/slurm.md").read_text()
    (line,) = re.findall(r"^srun.*pilotfish up .*", text, flags=re.MULTILINE)
    args = _pilotfish_up(line.replace('"$SLURM_NNODES"', "2"))
    assert config_flags.serve_config(args).fleet.num_replicas == 16


def _pilotfish_up(command: str):
    words = shlex.split(command.partition("pilotfish ")[2], comments=True)
    return build_parser("up").parse_args(words)
