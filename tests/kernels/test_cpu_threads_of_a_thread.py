"""A computing thread's kernels have their own number of threads; torch has one there and keeps the others' everywhere else."""

import threading

import torch
from pilotfish.kernels.cpu.threads import num_threads, use_threads


def test_the_calling_thread_alone_is_changed():
    before = torch.get_num_threads()
    seen = {}

    def compute() -> None:
        seen["default"] = num_threads()
        use_threads(3)
        seen["kernels"], seen["torch"] = num_threads(), torch.get_num_threads()

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join(timeout=30)
    assert seen == {"default": before, "kernels": 3, "torch": 1}
    assert torch.get_num_threads() == num_threads() == before
