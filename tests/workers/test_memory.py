from __future__ import annotations

import logging
import mmap
from pathlib import Path

import pytest
import torch
from pilotfish.common.config import EngineConfig
from pilotfish.common.errors import ConfigError
from pilotfish.workers.memory import available_bytes, cgroup_available_bytes, measure_peak, num_kv_blocks

CPU = torch.device("cpu")
MIB = 2**20


def test_the_peak_counts_what_was_given_back_and_not_what_was_kept():
    kept = []
    with measure_peak(CPU) as peak:
        kept.append(touched(40))
        touched(160).close()
    assert 150 * MIB < peak.temporary_bytes < 300 * MIB
    with measure_peak(CPU) as peak:
        kept.append(touched(8))
    assert peak.temporary_bytes < 100 * MIB


def touched(mebibytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, mebibytes * MIB)
    for offset in range(0, len(memory), 4096):
        memory[offset] = 1
    return memory


def test_available_memory_is_less_than_the_machine_has():
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < available_bytes(CPU) < total


VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
VERSION_2 = ("memory.max", "memory.current")


def write_group(folder: Path, names: tuple[str, str], limit: str, usage: int, *, cache: int) -> None:
    folder.mkdir(parents=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\nactive_file 7\n")


def test_every_group_of_version_2_around_the_process_counts(tmp_path):
    write_group(tmp_path / "pod", VERSION_2, "1000", 700, cache=100)
    write_group(tmp_path / "pod" / "box", VERSION_2, "max", 600, cache=100)
    write_group(tmp_path / "pod" / "box" / "in", VERSION_2, "900", 500, cache=50)
    membership = tmp_path / "membership"
    membership.write_text("0::/pod/box/in\n")
    assert sorted(cgroup_available_bytes(membership=membership, root=tmp_path)) == [400, 450]


def test_the_memory_group_of_version_1_counts(tmp_path):
    write_group(tmp_path / "memory", VERSION_1, str(2**63 - 4096), 10, cache=0)
    write_group(tmp_path / "memory" / "docker" / "a", VERSION_1, "5000", 5100, cache=20)
    membership = tmp_path / "membership"
    membership.write_text("8:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n")
    left = cgroup_available_bytes(membership=membership, root=tmp_path)
    assert min(left) == 0
    assert max(left) == 2**63 - 4096 - 10


def blocks(available: int, *, temporary: int = 0, max_model_len: int = 4096, fraction: float = 0.5, **options) -> int:
    return num_kv_blocks(
        config=EngineConfig(**{"max_num_seqs": 4, **options}),
        fraction=fraction,
        max_model_len=max_model_len,
        bytes_per_block=100,
        available=available,
        temporary_bytes=temporary,
    )


def test_the_cache_takes_its_fraction_of_what_the_largest_step_leaves():
    assert blocks(100_000, temporary=20_000) == 400
    assert blocks(100_000, temporary=20_000, fraction=0.25) == 200


def test_the_cache_is_not_larger_than_all_sequences_can_fill():
    assert blocks(10**9) == 4 * 256
    assert blocks(10**9, max_model_len=4097) == 4 * 257


def test_an_exact_number_of_blocks_is_obeyed():
    assert blocks(0, num_kv_blocks=7) == 7
    with pytest.raises(ConfigError, match="num_kv_blocks must be at least 1"):
        blocks(0, num_kv_blocks=0)


def test_too_little_memory_names_the_settings_to_change():
    with pytest.raises(ConfigError, match=r"kv_memory_fraction.*max_num_batched_tokens"):
        blocks(12_000)
    with pytest.raises(ConfigError, match="0 tokens"):
        blocks(1_000, temporary=2_000)
    assert blocks(12_800) == 64  # exactly the smallest useful cache


def test_a_cache_smaller_than_the_context_is_announced(caplog):
    with caplog.at_level(logging.WARNING):
        blocks(50_000)
    assert "fewer than the model's context of 4096" in caplog.text
