"""Sums by copies, where the ranks are streams of this process on one GPU; between two GPUs: test_comm.py."""

from __future__ import annotations

import pytest
import torch
from pilotfish.common.errors import InternalError
from pilotfish.models.parallel import StartedSum
from pilotfish.workers.peer_collectives import PeerCollectives
from pilotfish.workers.pushed_sums import NUM_SLOTS, PushedSums
from pushed_turns import PushedTurns
from stream_ranks import StreamRanks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture
def ranks() -> StreamRanks:
    return StreamRanks(2, capacity_bytes=4096)


@pytest.fixture
def pushed(ranks: StreamRanks) -> list[PushedSums]:
    """Of each rank; nothing is compiled any more when they are captured."""
    slots = [torch.zeros(NUM_SLOTS, PushedTurns.MAX_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2)]
    both = [
        PushedSums(PeerCollectives(ranks.buffers[rank]), slots[rank], [slot.data_ptr() for slot in slots[1 - rank]])
        for rank in range(2)
    ]
    x = torch.ones(4, 1024, dtype=torch.bfloat16, device="cuda")
    for started in ranks.run(lambda rank, _: both[rank].start(x * rank)):
        y, new_residual = started.wait_and_norm(x, x[0], 1e-6)
        assert torch.equal(new_residual, 2 * x)
        torch.testing.assert_close(y, x)
    return both


def test_on_a_gpu_sums_are_right_whoever_is_late(ranks: StreamRanks, pushed: list[PushedSums]) -> None:
    """Launched one by one; through graphs, between two GPUs: test_comm.py."""
    device = torch.device("cuda", torch.cuda.current_device())
    for stream in ranks.streams:  # nothing is loaded or allocated any more while a rank waits for the other
        with torch.cuda.stream(stream):
            PushedTurns(lambda x: StartedSum(x, lambda: None, x), rank=0, device=device).run()
    turns = [PushedTurns(pushed[rank].start, rank=rank, device=device) for rank in range(2)]
    for run in range(20):
        outputs = []
        for rank, turn in enumerate(turns):
            with torch.cuda.stream(ranks.streams[rank]):
                if run % 3 == rank:
                    torch.cuda._sleep(run * 7919 % 1_000_000)
                outputs.append(turn.run())
    torch.cuda.synchronize()
    ranks.assert_all_came()
    assert [float(turn.worst) for turn in turns] == [0.0, 0.0]
    for ours, theirs in zip(*outputs, strict=True):
        assert torch.equal(ours, theirs)


def test_on_a_gpu_what_does_not_fit_is_left_and_no_slot_is_used_twice(pushed: list[PushedSums]) -> None:
    assert pushed[0].start(torch.zeros(PushedTurns.MAX_BYTES + 1, dtype=torch.uint8, device="cuda")) is None
    pushed[0].peers.buffers.end_waits()  # the other rank will not come
    x = torch.ones(4, 1024, dtype=torch.bfloat16, device="cuda")
    first, _ = (pushed[0].start(x) for _ in range(NUM_SLOTS))
    with pytest.raises(InternalError, match="2 sums over ranks are under way"):
        pushed[0].start(x)
    first.finish()
    pushed[0].start(x).finish()
    torch.cuda.synchronize()
