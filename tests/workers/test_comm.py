"""A group of ranks, each in a process of its own: gloo here; NCCL and shared memory where there are two GPUs."""

from __future__ import annotations

import comm_work
import pytest
import torch
from pilotfish.workers.peer_memory import CAPACITY_BYTES, MAX_ONE_SHOT_SENT_BYTES, choose_way
from rank_group_run import run_on_ranks

# --- anywhere


def test_a_message_s_way_follows_from_its_size():
    assert MAX_ONE_SHOT_SENT_BYTES <= CAPACITY_BYTES
    assert choose_way(16, 2) == choose_way(MAX_ONE_SHOT_SENT_BYTES, 2) == "one_shot"
    assert choose_way(CAPACITY_BYTES + 16, 2) == choose_way(CAPACITY_BYTES + 16, 8) == "group"
    assert choose_way(16, 8) == choose_way(MAX_ONE_SHOT_SENT_BYTES // 7, 8) == "one_shot"
    assert choose_way(MAX_ONE_SHOT_SENT_BYTES // 7 + 16, 8) == "two_shot"


@pytest.mark.parametrize("size", [2, 3])
def test_collectives_are_right_on_every_rank(size):
    for rank, answers in enumerate(run_on_ranks(size, comm_work.collect, device_type="cpu")):
        total = size * (size - 1) / 2
        assert answers["sum"] == [[total, total + size], [total + 2 * size, total + 3 * size]]
        assert answers["norm_error"] < 1e-6
        assert answers["gathered"] == [[10.0 * row + other for other in range(size)] for row in range(2)]
        assert answers["gathered_flat"] == [float(other) for other in range(size) for _ in range(2)]
        assert answers["broadcast"] == [7.0]
        assert answers["least"] == -size + 1, rank


def test_descriptors_reach_every_other_rank():
    for rank, heard in enumerate(run_on_ranks(3, comm_work.exchange_pipes, device_type="cpu")):
        assert heard == {str(other): f"from {other} to {rank}" for other in range(3) if other != rank}


def test_a_rank_that_gives_no_descriptor_is_an_error():
    _, error = run_on_ranks(2, comm_work.exchange_with_a_rank_that_left, device_type="cpu")
    assert error.startswith(("FileNotFoundError", "ConnectionRefusedError"))


# --- on two GPUs

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@pytest.mark.gpu2
@needs_two
def test_on_two_gpus_sums_equal_the_reference():
    for problems in run_on_ranks(2, comm_work.check_sums, device_type="cuda"):
        assert problems == []


@pytest.mark.gpu2
@needs_two
def test_on_two_gpus_a_graph_replayed_often_is_right_whoever_is_late():
    for wrong, missing in run_on_ranks(2, comm_work.replay_often, 1000, device_type="cuda"):
        assert (wrong, missing) == (0.0, None)


@pytest.mark.gpu2
@needs_two
def test_on_two_gpus_a_rank_that_does_not_come_is_named_in_time():
    (message, waited_s), _ = run_on_ranks(2, comm_work.wait_in_vain, 2.0, device_type="cuda")
    assert message.startswith("rank 1 took no part in a sum over ranks within 2 s")
    assert 1.9 < waited_s < 4


@pytest.mark.gpu2
@needs_two
def test_on_two_gpus_other_collectives_can_be_captured():
    for problems in run_on_ranks(2, comm_work.capture_group_collectives, device_type="cuda"):
        assert problems == []
