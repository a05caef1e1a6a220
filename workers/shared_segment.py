"""A piece of memory that processes of one node share: a file that lives in memory, mapped by each.

Its creator makes it, others open it, and the creator takes its name away: once all have opened it, or when it closes or ends.
What has no name is freed by the system when the last process that mapped it is gone, however it died.

`multiprocessing.shared_memory` is not used: before Python 3.13 every process that attaches also registers the segment for
removal, so the first reader that ends takes it from the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
import weakref
from pathlib import Path

from ..common.errors import ConfigError
from . import futex

_FLOCK = struct.Struct("hhqqi0q")  # struct flock: type, whence, start, length, pid


class SharedSegment:
    """See the module's docstring.

    Attributes:
        data: all its bytes.
        words: the same as 8-byte words. A word is read and written whole (one aligned load or store: `memoryview` of a native
            format copies a constant 8 bytes), so that another process sees the old value or the new one.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._map = mmap.mmap(file, os.fstat(file).st_size)
        self.data = memoryview(self._map)
        self.words = self.data.cast("Q")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._unlink: weakref.finalize[..., SharedSegment] | None = None

    @classmethod
    def create(cls, name: str, *, num_bytes: int) -> SharedSegment:
        """A new segment of zeros.

        Raises:
            ConfigError: there is one of this name, or the memory is not there.
        """
        path = _path(name)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise ConfigError(f"{path} exists: another replica or epoch uses this name, or left it behind") from error
        try:
            os.posix_fallocate(file, 0, num_bytes)  # now, for a page that is missing later would kill the process
            segment = cls(file)
        except OSError as error:
            os.close(file)
            os.unlink(path)
            raise ConfigError(
                f"{num_bytes} bytes of shared memory are not to be had at {path} ({error.strerror}): give the container more "
                "(docker run --shm-size)"
            ) from error
        segment._unlink = weakref.finalize(segment, _unlink_of_creator, str(path), os.getpid())
        return segment

    @classmethod
    def open(cls, name: str) -> SharedSegment:
        """An existing segment; FileNotFoundError where there is none, ValueError while it is being made."""
        file = os.open(_path(name), os.O_RDWR)
        try:
            return cls(file)
        except BaseException:
            os.close(file)
            raise

    def hold(self, number: int) -> None:
        """Marks this process as the living holder of `number`, until it closes the segment or dies.

        With a lock of the open file: the system drops it when the process dies, whatever killed it and whichever namespace
        it was in.
        """
        fcntl.fcntl(self._file, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0))

    def is_held(self, number: int) -> bool:
        """Whether someone else who holds `number` lives."""
        answer = fcntl.fcntl(self._file, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0))
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def wait(self, word: int, seen: int, timeout_s: float) -> None:
        """Sleeps while the low half of words[word] is that of `seen`, which was read from it: futex.py says until when."""
        futex.wait(self._address + 8 * word, seen, timeout_s)

    def set_and_wake(self, word: int, value: int) -> None:
        """Writes words[word] and wakes all who wait for it to change."""
        self.words[word] = value
        futex.wake(self._address + 8 * word)

    def remove_name(self) -> None:
        """Nobody else can open it from now on; those who have keep it. Only its creator can."""
        if self._unlink is not None:
            self._unlink()

    @property
    def is_open(self) -> bool:
        return not self._map.closed

    def close(self) -> None:
        self.remove_name()
        if not self.is_open:
            return
        self.words.release()
        self.data.release()
        self._map.close()
        os.close(self._file)


def _path(name: str) -> Path:
    if not name or "/" in name:
        raise ConfigError(f"the name of a shared segment is a plain word, not {name!r}")
    return Path("/dev/shm") / name


def _unlink_of_creator(path: str, pid: int) -> None:
    if os.getpid() == pid:  # a forked child inherits the finalizer
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
