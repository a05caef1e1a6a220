"""`pilotfish chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys

from ..common.errors import PilotfishError
from . import text_options
from .text_options import Pieces, StreamText

_HELP = "Ctrl-C stops an answer, /reset forgets the conversation, Ctrl-D or /exit ends."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("message", nargs="?", help="ask this one question and end; without it, talk until Ctrl-D")
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    text_options.add_arguments(parser)
    parser.epilog = _HELP


def run(args: argparse.Namespace) -> int:
    with text_options.open_streams(args) as (_, stream_chat):
        start = [] if args.system is None else [{"role": "system", "content": args.system}]
        message = args.message
        if message is None and not sys.stdin.isatty():
            message = sys.stdin.read()
        if message is not None:
            _print_pieces(stream_chat([*start, {"role": "user", "content": message}]))
            return 0
        return _talk(stream_chat, start)


def _talk(stream_chat: StreamText, start: list[dict[str, str]]) -> int:
    """The conversation; an error answers one message, and the next may be tried."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing and history for input()

    print(_HELP)
    messages = list(start)
    while True:
        try:
            text = input("\n> ").strip()
        except EOFError:
            print()
            return 0
        if text in ("/exit", "/quit"):
            return 0
        if text == "/reset":
            messages = list(start)
        elif text:
            question = {"role": "user", "content": text}
            try:
                answer = _print_pieces(stream_chat([*messages, question]))
            except PilotfishError as error:
                print(f"\n{error}", file=sys.stderr)
                continue
            messages += [question, {"role": "assistant", "content": answer}]


def _print_pieces(pieces: Pieces) -> str:
    """Print an answer as it comes and return it; Ctrl-C ends it, and what there is stays in the conversation."""
    answer = []
    try:
        for piece in pieces:
            answer.append(piece.text)
            print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    finally:
        pieces.close()
        print()
    return "".join(answer)
