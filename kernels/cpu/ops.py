"""The C++ twins of the ops, with their public signatures."""

from __future__ import annotations

import torch


def supports(op: str, *dtypes: torch.dtype) -> bool:
    """Whether `op` has a twin for these dtypes."""
    return False
