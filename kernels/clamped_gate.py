"""What gpt-oss has in place of an activation, as data: kernels/gated_activation.py computes it. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ClampedGate:
    """y = g * sigmoid(alpha * g) * (u + 1), where g = min(gate, limit) and u = up, kept from -limit to limit."""

    alpha: float
    limit: float
