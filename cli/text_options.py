"""Options that `chat` and `generate` share: where the model runs, and how it samples."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ..client import Client
from ..client.options import DEFAULT_PORT

_SAMPLING: tuple[tuple[str, type, str], ...] = (
    ("max-tokens", int, "most tokens to produce (default: as many as fit)"),
    ("temperature", float, "0 is greedy (default: the server's, as `status` shows)"),
    ("top-p", float, "keep the likeliest tokens up to this probability"),
    ("top-k", int, "keep this many of the likeliest tokens"),
    ("min-p", float, "keep tokens at least this times as likely as the likeliest"),
    ("repetition-penalty", float, "over prompt and output; 1 is off"),
    ("presence-penalty", float, "over the output, -2 to 2"),
    ("frequency-penalty", float, "over the output, -2 to 2"),
    ("seed", int, "the same seed gives the same text"),
)


class Piece(Protocol):
    """What both streams yield."""

    @property
    def text(self) -> str: ...


class Pieces(Protocol):
    """An answer as it comes; `close` ends the rest of it."""

    def __iter__(self) -> Iterator[Piece]: ...
    def close(self) -> None: ...


StreamText = Callable[[Any], Pieces]
"""Text or chat messages to the pieces of their continuation."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where the model runs")
    where.add_argument("--address", default=f"127.0.0.1:{DEFAULT_PORT}", help="host:port of the server's gRPC door")
    where.add_argument("--local", metavar="MODEL", help="no server: load this model in this process")
    where.add_argument("--timeout", type=float, metavar="SECONDS", help="for each answer from a server")
    sampling = parser.add_argument_group("sampling")
    for name, kind, text in _SAMPLING:
        sampling.add_argument(f"--{name}", type=kind, help=text, metavar="N" if kind is int else "X")
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="end the text here; may be given again")


def sampling_fields(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line set."""
    names = [name.replace("-", "_") for name, _, _ in _SAMPLING] + ["stop"]
    return {name: value for name in names if (value := getattr(args, name)) is not None}


@contextmanager
def open_streams(args: argparse.Namespace) -> Iterator[tuple[StreamText, StreamText]]:
    """Functions that continue a text and answer a chat, on a server or, with --local, in this process."""
    sampling = sampling_fields(args)
    if args.local is None:
        with Client(args.address, timeout_s=args.timeout) as client:
            yield (
                lambda prompt: client.stream_generate(prompt, sampling),
                lambda messages: client.stream_chat(messages, sampling),
            )
        return
    from ..workers.pipeline import Pipeline  # here, because the SDK alone has no torch

    with Pipeline(args.local) as pipeline:
        yield (lambda prompt: pipeline.stream(prompt, sampling),) * 2
