"""Copies beside the work of steps: nothing is overwritten before it has been read, however late that is."""

import numpy as np
import pytest
import torch
from pilotfish.workers.side_copies import SideCopies

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]),
]


def be_late(device):
    """Whatever is queued behind this happens some 20 ms later."""
    if device == "cuda":
        torch.cuda._sleep(40_000_000)


def record(device):
    return torch.cuda.current_stream().record_event() if device == "cuda" else None


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_filled_was_read_before_and_is_there_for_what_comes_next(device):
    copies, target = SideCopies(torch.device(device)), torch.zeros(2, 3, dtype=torch.int64, device=device)
    seen = []
    for number in range(1, 5):
        copies.fill(target, np.full((2, 3), number))
        be_late(device)
        seen.append(target.clone())
        copies.was_read(record(device))
    assert [tensor.unique().tolist() for tensor in seen] == [[1], [2], [3], [4]]


@pytest.mark.parametrize("device", DEVICES)
def test_what_leaves_is_what_was_there_at_the_event(device):
    copies, tensor = SideCopies(torch.device(device)), torch.zeros(300, dtype=torch.int32, device=device)
    left = []
    for number in range(1, 5):
        be_late(device)
        copies.wait_until_left()
        tensor.fill_(number)
        left.append(copies.to_host(tensor, record(device)))
    arrived = copies.mark()
    assert (arrived is None) == (device == "cpu")
    if arrived is not None:
        arrived.synchronize()
    assert [on_host.unique().tolist() for on_host in left] == [[1], [2], [3], [4]]
    assert all(on_host.device.type == "cpu" for on_host in left)
