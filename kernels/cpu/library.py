"""The compiled library of C++ kernels."""

from __future__ import annotations


def unavailable_reason() -> str | None:
    """Why there are no C++ kernels, or None."""
    return "not built yet"
