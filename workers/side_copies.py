"""Copies between host and device beside the work of steps, on streams of their own.

A copy of a few bytes takes 2 us, and 10 with the waits around it, if it stands between two CUDA graphs. Here the columns of the
next step come while this one ends, and the tokens of a step leave while the next one begins.
"""

from __future__ import annotations

import numpy as np
import torch


class SideCopies:
    """Of one runner, whose work is queued on the current stream. On a CPU copies happen when they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self._was_read = self._has_left = torch.cuda.Event()  # one that was not recorded is not waited for

    def fill(self, target: torch.Tensor, array: np.ndarray) -> None:
        """Brings `array` into `target`, which what was queued before the last `was_read` has read by then."""
        source = torch.from_numpy(array)
        if not self._on_gpu:
            target.copy_(source)
            return
        with torch.cuda.stream(self._up):
            self._up.wait_event(self._was_read)
            target.copy_(source.pin_memory(), non_blocking=True)
        torch.cuda.current_stream().wait_stream(self._up)

    def was_read(self, event: torch.cuda.Event | None) -> None:
        """What is filled next may be overwritten when `event` has happened."""
        if event is not None:
            self._was_read = event

    def wait_until_left(self) -> None:
        """What is queued next may write where `to_host` reads: it has by then."""
        if self._on_gpu:
            torch.cuda.current_stream().wait_event(self._has_left)

    def to_host(self, tensor: torch.Tensor, event: torch.cuda.Event | None) -> torch.Tensor:
        """A copy on the host, made when `event` has happened, and there when the next `mark` has.

        Until what `wait_until_left` lets through, nothing may write the tensor or free it.
        """
        if not self._on_gpu or event is None:
            return tensor.clone()
        with torch.cuda.stream(self._down):
            self._down.wait_event(event)
            on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            self._has_left = self._down.record_event()
        return on_host

    def mark(self) -> torch.cuda.Event | None:
        """An event behind all that has been queued: on the current stream, and of copies to the host. None on a CPU."""
        if not self._on_gpu:
            return None
        self._down.wait_stream(torch.cuda.current_stream())
        return self._down.record_event()
