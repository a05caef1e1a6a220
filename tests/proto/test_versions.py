"""Versions that do not fit together are named, both of them and where; tests/controller/test_ray_cluster.py has it on Ray."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pilotfish
from pilotfish.proto.versions import mismatch, own_versions


def test_a_process_knows_its_own_without_torch() -> None:
    script = "import sys; from pilotfish.proto.versions import own_versions as own; print(own('n'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    own = own_versions("n")
    assert done.stdout.strip() == f"{own} False"
    assert own["pilotfish"] == pilotfish.__version__
    assert own["torch"] == importlib.metadata.version("torch")


def test_what_differs_is_named_with_both_versions_and_nodes() -> None:
    controller = own_versions("head")
    ranks = [own_versions("one"), own_versions("two")]
    assert mismatch(controller, ranks) == ""
    assert mismatch(controller | {"torch": "none"}, ranks) == ""  # a controller needs no torch
    older = mismatch(controller, [ranks[0], ranks[1] | {"pilotfish": "0.0.1"}])
    assert "node two has pilotfish 0.0.1" in older
    assert f"the controller's node head has pilotfish {pilotfish.__version__}" in older
    assert "node one has protocol abc" in mismatch(controller, [ranks[0] | {"protocol": "abc"}])
    mixed = mismatch(controller, [ranks[0] | {"torch": "2.11.0"}, ranks[1] | {"torch": "2.13.0"}])
    assert "node two has torch 2.13.0, and node one has torch 2.11.0" in mixed
    assert "node unknown has pilotfish unknown" in mismatch(controller, [{}])
