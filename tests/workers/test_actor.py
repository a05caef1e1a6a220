"""The actor class by itself; tests/controller/test_ray_cluster.py has it on Ray."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
from parts import LEADER
from pilotfish.common.config import EngineConfig, ModelConfig
from pilotfish.common.errors import InternalError, ModelNotFound
from pilotfish.workers import engine as engine_module
from pilotfish.workers.actor import WorkerActor, own_gpu

_EXIT_WHEN_FAILED = """
import sys, types
from pilotfish.workers import actor
assert "torch" not in sys.modules, "the actor class travels through the controller, which has no torch"
phases = iter(["idle", "step", "failed"])
actor._WATCH_INTERVAL_S = 0.01
actor._exit_when_failed(types.SimpleNamespace(health=lambda: types.SimpleNamespace(phase=next(phases))))
"""


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The actor sets up its process's logging; here that is the tests' process."""
    logger = logging.getLogger("pilotfish")
    before = (logger.handlers[:], logger.propagate, logger.level)
    yield
    logger.handlers[:], logger.propagate, logger.level = before


def start(model: str) -> None:
    WorkerActor("replica-0").start(
        model_config=ModelConfig(model=model),
        engine_config=EngineConfig(device="cpu", num_threads=1),
        epoch=1,
        identity=LEADER,
        controller_node="here",
        num_node_workers=1,
    )


def test_why_it_cannot_start_is_typed(tmp_path: object) -> None:
    with pytest.raises(ModelNotFound, match="nowhere"):
        start(f"{tmp_path}/nowhere")


def test_a_defect_at_the_start_is_an_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(engine_module, "set_up_runner", broken)
    with pytest.raises(InternalError, match="ZeroDivisionError: a defect"):
        start("any")


def test_the_process_ends_when_its_engine_has_failed() -> None:
    ended = subprocess.run([sys.executable, "-c", _EXIT_WHEN_FAILED], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 70, ended.stderr
    assert "the engine failed" in ended.stderr


@pytest.mark.parametrize(
    ("assigned", "visible", "number"),
    [
        ([], None, 0),  # on CPUs
        ([1], None, 1),
        (["3"], "2,3", 1),  # Ray was started with some of the node's
        (["GPU-b"], "GPU-a, GPU-b", 1),
        ([1], "1", 0),  # Ray hides the others
    ],
)
def test_a_rank_finds_the_gpu_that_ray_assigned(assigned: list[int | str], visible: str | None, number: int) -> None:
    assert own_gpu(assigned, visible) == number
