"""Set before any test imports a kernel: Triton reads TRITON_INTERPRET when it is imported."""

import os
import signal

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job: tests interrupt this process and others
    signal.signal(signal.SIGINT, signal.default_int_handler)
