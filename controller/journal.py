"""Resumable requests on the disk of the controller, so that its successor knows them: prompt, parameters, tenant,
deadline.

Their tokens are not here: workers run on and hold theirs, and the client that resumes brings what it has. An entry is written
before a request is queued and leaves some time after it has ended. It outlives the controller's process, not its machine:
nothing waits for the disk itself. The file has what users wrote, so only its owner can read it; an orderly end removes it.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from ..common.errors import ConfigError, Unavailable
from ..common.sampling_params import SamplingParams
from ..proto import common_pb2, journal_pb2
from ..proto.codec import request_from_proto, request_to_proto
from .choice_text import MakeText
from .front_end import Prepared, prepared_choices, prompt_hashes
from .streams import RequestStream

logger = logging.getLogger(__name__)

_SCHEMA = "CREATE TABLE IF NOT EXISTS requests (request_id TEXT PRIMARY KEY, entry BLOB NOT NULL) WITHOUT ROWID"


class Journal:
    """The file. `path` None is a journal that nobody will ever read: requests then end with their controller.

    Raises:
        ConfigError: the file cannot be opened.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (owner := path.parent.stat().st_uid) != os.getuid():
                raise ConfigError(
                    f"cannot keep the journal of requests in {path.parent}: it belongs to user {owner}; remove it"
                )
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, mode=0o600))
            self._database = sqlite3.connect(path, isolation_level=None, timeout=10)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = OFF")
            self._database.execute(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"cannot keep the journal of requests at {path}: {error}") from error

    def add(self, entry: journal_pb2.JournalEntry) -> None:
        """Raises Unavailable: it cannot be written, so the request would not survive the controller as its client expects."""
        if self._database is None:
            return
        values = (entry.request_id, entry.SerializeToString())
        try:
            self._database.execute("INSERT OR REPLACE INTO requests VALUES (?, ?)", values)
        except sqlite3.Error as error:
            logger.error("the journal of requests at %s cannot be written: %s", self._path, error)
            raise Unavailable(
                f"the server cannot write its journal of requests ({error}), so it takes none that may be resumed; its "
                "operator has to free space on the controller's disk"
            ) from error

    def remove(self, request_ids: Iterable[str]) -> None:
        """What cannot be removed stays until the end: a successor would hold it for a while, and then forget it."""
        if self._database is None:
            return
        try:
            with self._database:
                self._database.execute("BEGIN")
                self._database.executemany("DELETE FROM requests WHERE request_id = ?", ((name,) for name in request_ids))
        except sqlite3.Error as error:
            logger.error("requests that have ended stay in the journal at %s: %s", self._path, error)

    def entries(self) -> Iterator[journal_pb2.JournalEntry]:
        """What an earlier controller left."""
        if self._database is not None:
            for (data,) in self._database.execute("SELECT entry FROM requests").fetchall():
                yield journal_pb2.JournalEntry.FromString(data)

    def close(self, *, remove: bool) -> None:
        """`remove`: all requests have ended, and nobody will come for them."""
        if self._database is None or self._path is None:
            return
        self._database.close()
        self._database = None
        if remove:
            for suffix in ("", "-wal", "-shm"):
                self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)


def entry_of(stream: RequestStream, prepared: Prepared) -> journal_pb2.JournalEntry:
    """What a successor needs of a request that is about to be queued, but its deadline."""
    first, *others = prepared.requests
    text = prepared.text_params
    return journal_pb2.JournalEntry(
        request_id=stream.request_id,
        model=stream.model,
        created_unix_s=stream.created_unix_s,
        choices=[request_to_proto(first), *(request_to_proto(replace(other, prompt_token_ids=())) for other in others)],
        text=common_pb2.SamplingParams(
            stop=text.stop,
            min_tokens=text.min_tokens,
            skip_special_tokens=text.skip_special_tokens,
            include_stop_str_in_output=text.include_stop_str_in_output,
        ),
        continues_text=prepared.continues_text,
        prompt_text=prepared.prompt_text,
        tenant=stream.tenant.name,
    )


def prepared_of(entry: journal_pb2.JournalEntry, *, make_text: MakeText, block_size: int | None) -> Prepared:
    """The request as it was when its entry was made. `block_size` None: nobody routes it here, so its hashes are not needed."""
    requests = [request_from_proto(choice) for choice in entry.choices]
    return prepared_choices(
        tuple(replace(request, prompt_token_ids=requests[0].prompt_token_ids) for request in requests),
        text_params=SamplingParams(
            stop=tuple(entry.text.stop),
            min_tokens=entry.text.min_tokens,
            skip_special_tokens=entry.text.skip_special_tokens,
            include_stop_str_in_output=entry.text.include_stop_str_in_output,
        ),
        continues_text=entry.continues_text,
        prompt_text=entry.prompt_text,
        prompt_hashes=prompt_hashes(requests[0], block_size, version="") if block_size else (),
        version="",
        make_text=make_text,
    )
