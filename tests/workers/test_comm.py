"""A group of ranks, each in a process of its own: gloo here; NCCL and shared memory where there are two GPUs."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import comm_work
import pytest
import torch
from pilotfish.common.errors import InternalError
from pilotfish.common.rank_place import RankPlace
from pilotfish.workers.comm import RankGroup, Rendezvous
from pilotfish.workers.peer_collectives import MAX_ONE_SHOT_SENT_BYTES, MAX_TWO_SHOT_BYTES, PeerCollectives, choose_way
from rank_group_run import HOST, run_on_ranks
from stream_ranks import buffers_on_cpu

# --- anywhere


def test_a_sum_s_way_follows_from_its_size():
    assert choose_way(16, 2) == choose_way(MAX_ONE_SHOT_SENT_BYTES, 2) == "one_shot"
    assert choose_way(16, 8) == choose_way(MAX_ONE_SHOT_SENT_BYTES // 7, 8) == "one_shot"
    assert choose_way(MAX_ONE_SHOT_SENT_BYTES // 7 + 16, 8) == choose_way(MAX_TWO_SHOT_BYTES, 8) == "two_shot"
    assert choose_way(MAX_ONE_SHOT_SENT_BYTES + 16, 2) is choose_way(MAX_TWO_SHOT_BYTES + 16, 8) is None


def test_what_is_too_large_or_of_another_dtype_is_left_to_the_group():
    peers = PeerCollectives(buffers_on_cpu())
    wide, narrow = torch.zeros(64, 64), torch.zeros(66, 64, dtype=torch.bfloat16)
    for x in (wide, narrow):
        assert peers.all_reduce(x) is peers.all_reduce_norm(x, x, x[0], 1e-6) is peers.reduce_scatter(x) is None
        assert peers.all_gather(x) is None
    with pytest.raises(ValueError, match="x is on cpu"):  # but this one is theirs
        peers.all_reduce(narrow[:32])


def test_a_missing_rank_voids_the_step():
    peers = PeerCollectives(buffers_on_cpu())
    peers.check()
    peers.buffers.failed.fill_(2)
    with pytest.raises(InternalError, match="rank 1 took no part in a collective within 1 s: the step is void"):
        peers.check()


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


def test_data_ranks_gather_and_scatter_rows():
    assert run_on_ranks(1, comm_work.check_rows, device_type="cpu", data_size=2) == [[], []]


def join_both(*, timeout_s: float) -> list[RankGroup]:
    rendezvous = Rendezvous(host=HOST, timeout_s=timeout_s)
    shared = {"size": 2, "epoch": 0, "address": rendezvous.address, "host": HOST, "timeout_s": timeout_s}
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda rank: RankGroup.join(RankPlace(rank=rank, **shared), torch.device("cpu")), range(2)))


def test_a_group_can_be_closed_again_and_after_the_others():
    first, second = join_both(timeout_s=2)
    first.end_set_up()
    for group in (second, first, first):
        group.close()
    with pytest.raises(RuntimeError):
        first.all_reduce(torch.zeros(1))


def test_a_rank_may_be_late_until_set_up_is_over():
    """One that loads or compiles for longer than a collective may take."""
    groups = join_both(timeout_s=0.5)
    with ThreadPoolExecutor(1) as thread:
        early = thread.submit(groups[0].agree_on_least, 3)
        time.sleep(1.5)
        assert groups[1].agree_on_least(2) == early.result() == 2
    for group in groups:
        group.end_set_up()
    start_s = time.monotonic()
    with pytest.raises(RuntimeError, match="500ms"):
        groups[0].agree_on_least(3)
    assert time.monotonic() - start_s < 5


# --- on two GPUs

needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@pytest.mark.gpu2
@needs_two
def test_on_two_gpus_sums_equal_the_reference():
    for problems in run_on_ranks(2, comm_work.check_sums, device_type="cuda"):
        assert problems == []


@pytest.mark.gpu2
@needs_two
def test_on_two_gpus_data_ranks_gather_and_scatter_rows():
    assert run_on_ranks(1, comm_work.check_rows, device_type="cuda", data_size=2) == [[], []]


@pytest.mark.gpu2
@needs_two
def test_on_two_gpus_a_graph_replayed_often_is_right_whoever_is_late():
    for wrong, failure in run_on_ranks(2, comm_work.replay_often, 1000, device_type="cuda"):
        assert (wrong, failure) == (0.0, "")


@pytest.mark.gpu2
@needs_two
@pytest.mark.parametrize("call_in_vain", [comm_work.wait_in_vain, comm_work.push_in_vain])
def test_on_two_gpus_a_rank_that_does_not_come_is_named_in_time(call_in_vain):
    (message, waited_s), _ = run_on_ranks(2, call_in_vain, 2.0, device_type="cuda")
    assert message.startswith("rank 1 took no part in a collective within 2 s")
    assert 1.9 < waited_s < 4


@pytest.mark.gpu2
@needs_two
def test_on_two_gpus_pushed_sums_are_right_whoever_is_late():
    for wrong, same, failure in run_on_ranks(2, comm_work.push_sums_often, 20, device_type="cuda"):
        assert (wrong, same, failure) == (0.0, True, "")


@pytest.mark.gpu2
@needs_two
@pytest.mark.parametrize("pushes", [True, False])
@pytest.mark.parametrize("model", ["dummy:qwen3-0.6b", "dummy:tiny-moe"])
def test_on_two_gpus_halves_equal_the_whole(model, pushes):
    for errors, of_another in run_on_ranks(2, comm_work.compare_halves, model, pushes, device_type="cuda"):
        assert max(errors) < 0.05, errors
        assert of_another > 0.5


@pytest.mark.gpu2
@needs_two
def test_on_two_gpus_other_collectives_can_be_captured():
    for problems in run_on_ranks(2, comm_work.capture_group_collectives, device_type="cuda"):
        assert problems == []
