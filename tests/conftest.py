"""Set before any test imports a kernel: Triton reads TRITON_INTERPRET when it is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
