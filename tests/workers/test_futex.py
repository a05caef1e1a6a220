"""Waiting for a word of shared memory."""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from types import SimpleNamespace

import pytest
from pilotfish.common.errors import ConfigError
from pilotfish.workers import futex
from plan_ends import PATIENCE_S


@pytest.fixture
def word() -> ctypes.c_uint32:
    return ctypes.c_uint32.from_buffer(mmap.mmap(-1, mmap.PAGESIZE))


def test_a_word_that_is_another_already_is_not_waited_for(word: ctypes.c_uint32) -> None:
    word.value = 2**32 - 1
    start_s = time.monotonic()
    futex.wait(ctypes.addressof(word), 7, PATIENCE_S)
    assert time.monotonic() - start_s < PATIENCE_S / 2


def test_the_low_half_of_a_longer_word_counts(word: ctypes.c_uint32) -> None:
    word.value = 7
    start_s = time.monotonic()
    futex.wait(ctypes.addressof(word), 2**32 + 7, 0.02)
    assert time.monotonic() - start_s >= 0.02


def test_all_who_wait_are_woken_and_other_threads_run_meanwhile(word: ctypes.c_uint32) -> None:
    seen: list[int] = []

    def follow() -> None:
        while word.value == 0:
            futex.wait(ctypes.addressof(word), 0, PATIENCE_S)
        seen.append(word.value)

    threads = [threading.Thread(target=follow, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)  # they wait by now
    word.value = 1
    futex.wake(ctypes.addressof(word))
    for thread in threads:
        thread.join(PATIENCE_S / 2)
    assert seen == [1, 1, 1]


def test_what_the_system_refuses_is_said(word: ctypes.c_uint32) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        futex.wait(ctypes.addressof(word) + 1, 0, PATIENCE_S)
    with pytest.raises(OSError, match="Invalid argument"):
        futex.wake(ctypes.addressof(word) + 1)


def test_other_systems_are_named(word: ctypes.c_uint32, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futex, "_SYSTEM", SimpleNamespace(sysname="Linux", machine="riscv64"))
    with pytest.raises(ConfigError, match="Linux aarch64, not on Linux riscv64"):
        futex.wake(ctypes.addressof(word))
