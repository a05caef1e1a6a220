"""How many CPU threads the computation should use: the cores that this process may run on, and its share of them."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

from ..common.config import DEFAULT_KV_MEMORY_FRACTION, EngineConfig


def usable_cores(*, cgroup_root: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores of the process's affinity mask, less where a container's CPU quota (cgroup versions 1 and 2) is tighter."""
    cores = len(os.sched_getaffinity(0))
    quota = _quota_cores(cgroup_root)
    return max(1, min(cores, math.ceil(quota))) if quota else cores


def share_of_machine(config: EngineConfig, num_workers: int) -> EngineConfig:
    """Of an engine on CPUs, whose machine's cores and memory `num_workers` share."""
    fraction = config.kv_memory_fraction or DEFAULT_KV_MEMORY_FRACTION["cpu"]
    return replace(
        config,
        num_threads=config.num_threads or max(1, usable_cores() // num_workers),
        kv_memory_fraction=fraction / num_workers,
    )


def _quota_cores(root: Path) -> float | None:
    """Cores' worth of time that the quota allows; None where there is none."""
    version_2, version_1 = root / "cpu.max", root / "cpu" / "cpu.cfs_quota_us"
    if version_2.exists():
        quota, period = version_2.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    if version_1.exists():
        quota_us = int(version_1.read_text())
        period_us = int((root / "cpu" / "cpu.cfs_period_us").read_text())
        return None if quota_us <= 0 else quota_us / period_us
    return None
