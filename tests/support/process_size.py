"""What a process holds: memory and file descriptors."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_SLACK_MIB = 16.0  # an allocator keeps some of what it was given
_SLACK_FILES = 8  # connections that end, and those that follow them


@dataclass(frozen=True)
class ProcessSize:
    rss_mib: float
    num_files: int

    @classmethod
    def of(cls, pid: int) -> ProcessSize:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        rss_kib = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
        return cls(rss_kib / 1024, len(os.listdir(f"/proc/{pid}/fd")))

    def check_no_larger_than(self, before: ProcessSize) -> None:
        assert self.rss_mib <= before.rss_mib + _SLACK_MIB, f"memory has grown from {before} to {self}"
        assert self.num_files <= before.num_files + _SLACK_FILES, f"file descriptors have grown from {before} to {self}"

    def __str__(self) -> str:
        return f"{self.rss_mib:.0f} MiB and {self.num_files} descriptors"
