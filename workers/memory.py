"""How much memory there is, and how much of it a KV cache may take: measured, never guessed.

Life cycle: after the weights are loaded the runner executes the largest batch that it can be given under `measure_peak`;
what is then available, less what such a batch needs again, is shared out by `num_kv_blocks`.
On a CPU the limits of the process's control groups (versions 1 and 2) count as much as the machine's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..common.config import EngineConfig
from ..common.errors import ConfigError

logger = logging.getLogger(__name__)

# A cache that holds fewer tokens than this (or than the model's context) serves nobody.
SMALLEST_USEFUL_TOKENS = 1024
_GIB = 2**30


@dataclass(slots=True)
class PeakMemory:
    """`temporary_bytes`: what the measured code needed at its peak and had given back at its end."""

    temporary_bytes: int = 0


@contextmanager
def measure_peak(device: torch.device) -> Iterator[PeakMemory]:
    """Measures the body's peak; the figure is there once the body has ended."""
    peak = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.temporary_bytes = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        return
    _reset_resident_peak()
    yield peak
    peak.temporary_bytes = max(0, _status_bytes("VmHWM") - _status_bytes("VmRSS"))


def available_bytes(device: torch.device) -> int:
    """Memory that this process could still take on the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    available = _keyed_bytes(Path("/proc/meminfo"), "MemAvailable")
    return min([available, *cgroup_available_bytes()])


def cgroup_available_bytes(*, membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What each control group around this process leaves: limit - usage + the page cache it would drop first."""
    left = []
    for line in membership.read_text().splitlines() if membership.exists() else ():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            top, limit, usage = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in [group, *group.parents]:
            if (folder / limit).exists():
                left += _left_in_group(folder, limit, usage)
            if folder == top:
                break
    return left


def num_kv_blocks(
    *, config: EngineConfig, fraction: float, max_model_len: int, bytes_per_block: int, available: int, temporary_bytes: int
) -> int:
    """Blocks of the KV cache.

    `config.num_kv_blocks` where it is given; else `fraction` of (available - temporary_bytes), at most what
    max_num_seqs sequences of max_model_len tokens can fill.

    Raises:
        ConfigError: too little memory for one useful sequence; the message names what to change.
    """
    blocks_per_sequence = -(-max_model_len // config.block_size)
    if config.num_kv_blocks is not None:
        if config.num_kv_blocks < 1:
            raise ConfigError(f"num_kv_blocks must be at least 1, not {config.num_kv_blocks}")
        return config.num_kv_blocks
    budget = int((available - temporary_bytes) * fraction)
    fitting = max(0, budget) // bytes_per_block
    useful_tokens = min(max_model_len, SMALLEST_USEFUL_TOKENS)
    if fitting * config.block_size < useful_tokens:
        raise ConfigError(
            f"the KV cache would hold {fitting * config.block_size} tokens, fewer than {useful_tokens}: "
            f"{available / _GIB:.2f} GiB are available after loading, the largest step needs {temporary_bytes / _GIB:.2f} GiB "
            f"of them, and kv_memory_fraction {fraction} of the rest is {max(0, budget) / _GIB:.2f} GiB. "
            "Raise kv_memory_fraction, lower max_num_batched_tokens or max_model_len, or free memory on this machine"
        )
    blocks = min(fitting, config.max_num_seqs * blocks_per_sequence)
    if blocks < blocks_per_sequence:
        logger.warning(
            "the KV cache holds %d tokens, fewer than the model's context of %d: longer requests are refused",
            blocks * config.block_size,
            max_model_len,
        )
    return blocks


def _left_in_group(folder: Path, limit: str, usage: str) -> list[int]:
    text = (folder / limit).read_text().strip()
    if text == "max":
        return []
    # Version 1 writes "no limit" as a number near 2^63, which takes part and never wins.
    cache = _keyed_bytes(folder / "memory.stat", "inactive_file", missing=0)
    return [max(0, int(text) - int((folder / usage).read_text()) + cache)]


def _reset_resident_peak() -> None:
    """Sets VmHWM back to VmRSS (proc(5), clear_refs 5); where that is not allowed the peak of the whole life counts."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        logger.info("cannot reset the peak of resident memory (%s): the measured peak includes loading", error)


def _status_bytes(key: str) -> int:
    return _keyed_bytes(Path("/proc/self/status"), key)


def _keyed_bytes(path: Path, key: str, *, missing: int | None = None) -> int:
    """The value of `key` in a file of lines `key value [kB]`."""
    for line in path.read_text().splitlines() if path.exists() else ():
        words = line.replace(":", " ").split()
        if words and words[0] == key:
            return int(words[1]) * (1024 if words[-1] == "kB" else 1)
    if missing is None:
        raise ConfigError(f"cannot measure memory: {path} has no {key}; give the size of the KV cache as num_kv_blocks")
    return missing
