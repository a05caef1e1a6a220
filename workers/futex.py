"""Waiting until a word of memory changes, between threads or processes that share it: Linux's futex, not its private kind.

Who waits reads the word, finds nothing to do, and calls `wait` with what it read; who changes the word calls `wake` after that.
No change is missed in between, for the kernel compares the word once more before it puts anybody to sleep (futex(2)). All that
the one who waits decides by has to be in this one word: a processor may show changes of two in another order.
"""

from __future__ import annotations

import ctypes
import errno
import os

from ..common.errors import ConfigError

_NUMBERS = {("Linux", "x86_64"): 202, ("Linux", "aarch64"): 98}  # of the system call
_SYSTEM = os.uname()
_WAIT, _WAKE = 0, 1
_EVERYONE = 2**31 - 1
_PLAIN_ENDS = (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT)  # the word is another already; a signal; the time is over

_syscall = ctypes.CDLL(None, use_errno=True).syscall  # other threads run meanwhile
_syscall.restype = ctypes.c_long
_syscall.argtypes = (ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


def wait(address: int, seen: int, timeout_s: float) -> None:
    """Sleeps while the 4 bytes at `address` are those of `seen`: until a `wake`, a signal, the timeout, or for no reason.

    Raises:
        ConfigError: not on this system.
        OSError: there is no such word.
    """
    seconds, rest_s = divmod(timeout_s, 1)
    _call(address, _WAIT, seen, ctypes.byref(_Timespec(int(seconds), int(rest_s * 1e9))))


def wake(address: int) -> None:
    """Wakes all who wait for the word to change; 2 us where nobody does. Raises as `wait`."""
    _call(address, _WAKE, _EVERYONE, None)


def _call(address: int, operation: int, value: int, timeout: object) -> None:
    kind = (_SYSTEM.sysname, _SYSTEM.machine)
    if kind not in _NUMBERS:
        known = ", ".join(" ".join(pair) for pair in _NUMBERS)
        raise ConfigError(f"processes of one node wait for each other on {known}, not on {' '.join(kind)}")
    if _syscall(_NUMBERS[kind], address, operation, value, timeout) < 0 and (number := ctypes.get_errno()) not in _PLAIN_ENDS:
        raise OSError(number, f"futex: {os.strerror(number)}")
