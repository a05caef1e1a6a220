"""A replica of several ranks, each in a process of its own, against one engine."""

from __future__ import annotations

import os
import re
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from pilotfish.common.config import ModelConfig
from pilotfish.common.errors import InternalError
from pilotfish.common.requests import EngineRequest, TokenSampling
from pilotfish.workers.comm import Rendezvous
from pilotfish.workers.engine import Engine, Phase
from pilotfish.workers.rank_watch import BEAT_INTERVAL_S, MAX_SILENT_LOOKS
from pilotfish.workers.ranks import lead
from rank_process import ENGINE, Collected, places, replica

LOUD = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.2, "logprobs": 2, "logit_bias": {5: 1.0}}
SAMPLING = [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 40}, LOUD, {"temperature": 0.0}]
PLAIN = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 5.0}]  # no filter, no rule
# The draws of a step go both ways in turn: the loud one ends first.
MIXED = [*PLAIN[:3], {**LOUD, "max_tokens": 5}]


def submit(engine: Engine, *, max_tokens: int = 12, samplings: list[dict] = SAMPLING, name: str = "r") -> None:
    for index, sampling in enumerate(samplings):
        settings = TokenSampling(**{"max_tokens": max_tokens, **sampling}, seed=index)
        engine.submit(EngineRequest(request_id=f"{name}{index}", prompt_token_ids=tuple(range(index, 30)), sampling=settings))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("samplings", [SAMPLING, PLAIN, MIXED], ids=["loud", "plain", "mixed"])
def test_ranks_say_what_one_engine_says(tiny_llama: Path, size: int, samplings: list[dict]) -> None:
    """3 ranks over 2 kv heads: two of them share one. What is plain is drawn by a race of all ranks, the rest by the leader."""
    alone = Collected()
    engine = Engine(ModelConfig(model=str(tiny_llama)), ENGINE, on_step=alone)
    engine.start()
    submit(engine, samplings=samplings)
    alone.wait_for_ends(len(SAMPLING))
    engine.stop()
    with replica(tiny_llama, size) as (leader, collected, followers):
        submit(leader, samplings=samplings)
        collected.wait_for_ends(len(SAMPLING))
        leader.stop()
        assert collected.tokens == alone.tokens
        for rank in range(1, size):
            assert "closed" in followers.said(rank)


def test_aborts_free_the_blocks_of_every_rank_within_two_steps(tiny_llama: Path) -> None:
    """Blocks are the leader's to give; a rank that kept anything of an aborted request would say something else."""
    with replica(tiny_llama, 2) as (leader, collected, _):
        submit(leader, name="before")
        collected.wait_for_ends(4)
        submit(leader, max_tokens=400, name="aborted")
        collected.wait_for(lambda: all(len(collected.tokens.get(f"aborted{i}", ())) >= 3 for i in range(4)), "tokens of all")
        assert all(leader.abort(f"aborted{index}") for index in range(4))
        last_step_id = collected.steps[-1].step_id
        collected.wait_for_ends(8)
        assert collected.steps[-1].step_id <= last_step_id + 2
        assert (collected.steps[-1].load.num_used_blocks, collected.steps[-1].load.num_running) == (0, 0)
        submit(leader, name="after")
        collected.wait_for_ends(12)
        for index in range(4):
            assert collected.tokens[f"after{index}"] == collected.tokens[f"before{index}"]


def test_a_dead_rank_ends_the_engine(tiny_llama: Path) -> None:
    with replica(tiny_llama, 2) as (leader, collected, followers):
        submit(leader, max_tokens=400)
        collected.wait_for_tokens(1)
        os.kill(followers.processes[0].pid or 0, signal.SIGKILL)
        assert wait_until_failed(leader, timeout_s=10)


def test_a_stopped_rank_is_named(tiny_llama: Path) -> None:
    with replica(tiny_llama, 2) as (leader, collected, followers):
        submit(leader, max_tokens=400)
        collected.wait_for_tokens(1)
        time.sleep(1)  # for a first beat
        os.kill(followers.processes[0].pid or 0, signal.SIGSTOP)
        message = wait_until_failed(leader, timeout_s=10)
        said = re.match(r"rank 1 on 127\.0\.0\.1 has been silent for [\d.]+ s; its last step was \d+ \(phase \w+\)", message)
        assert said, message
        assert BEAT_INTERVAL_S * (MAX_SILENT_LOOKS + 2) < 5  # by when it has to be named
        os.kill(followers.processes[0].pid or 0, signal.SIGCONT)


def test_a_rank_that_never_comes_is_missed(tiny_llama: Path) -> None:
    rendezvous = Rendezvous(host="127.0.0.1", timeout_s=2)
    leader = places(2, rendezvous.address, timeout_s=2.0)[0]
    engine = Engine(ModelConfig(model=str(tiny_llama)), ENGINE, on_step=Collected(), set_up=partial(lead, place=leader))
    with pytest.raises(InternalError, match="rank 0 of 2 found no group of all ranks"):
        engine.start()


def wait_until_failed(engine: Engine, *, timeout_s: float) -> str:
    """Its message, "" where it has not failed."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (health := engine.health()).phase is Phase.FAILED:
            return health.message
        time.sleep(0.05)
    return ""
