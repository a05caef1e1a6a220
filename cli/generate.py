"""`pilotfish generate`: continue a prompt, or every line of a file."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from ..client import Client
from ..common.errors import InvalidRequest, PilotfishError
from . import text_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="the text to continue; - reads it from standard input")
    parser.add_argument("--file", metavar="PATH", help="continue each line of this file instead; prints one JSON object a line")
    parser.add_argument("--concurrency", type=int, default=32, help="with --file: requests in flight")
    text_options.add_arguments(parser)
    parser.epilog = "With --file, a line that fails has its error in its object, and the exit code is 1."


def run(args: argparse.Namespace) -> int:
    if (args.prompt is None) == (args.file is None):
        raise InvalidRequest("give a prompt or --file, one of the two")
    if args.file is not None:
        return _generate_file(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    with text_options.open_streams(args) as (stream_text, _):
        for piece in stream_text(prompt):
            print(piece.text, end="", flush=True)
        print()
    return 0


def _generate_file(args: argparse.Namespace) -> int:
    if args.concurrency < 1:
        raise InvalidRequest(f"--concurrency must be at least 1, not {args.concurrency}")
    try:
        with open(args.file, encoding="utf-8") as file:
            prompts = [line.rstrip("\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"cannot read {args.file}: {error}") from error
    if args.local is not None:
        return _print_objects(prompts, _local_objects(args, prompts))
    sampling = text_options.sampling_fields(args)
    with Client(args.address, timeout_s=args.timeout) as client, ThreadPoolExecutor(args.concurrency) as pool:

        def one(prompt: str) -> dict[str, object]:
            try:
                completion = client.generate(prompt, sampling)
            except PilotfishError as error:
                return {"error": {"code": error.code, "message": error.message}}
            return {"text": completion.text, "finish_reason": completion.finish_reason}

        try:
            return _print_objects(prompts, pool.map(one, prompts))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()
            raise


def _local_objects(args: argparse.Namespace, prompts: list[str]) -> Iterable[dict[str, object]]:
    from ..workers.pipeline import Pipeline  # here, because the SDK alone has no torch

    with Pipeline(args.local) as pipeline:
        completions = pipeline(prompts, text_options.sampling_fields(args))
        assert isinstance(completions, list)
        for completion in completions:
            if completion.error is not None:
                yield {"error": {"code": completion.error.code, "message": completion.error.message}}
            else:
                yield {"text": completion.text, "finish_reason": completion.finish_reason}


def _print_objects(prompts: list[str], objects: Iterable[dict[str, object]]) -> int:
    """Print the results in the prompts' order, with a count on a terminal; 1 if any failed."""
    num_failed = 0
    numbers = itertools.count(1)
    for prompt, found, number in zip(prompts, objects, numbers, strict=False):
        num_failed += "error" in found
        print(json.dumps({"prompt": prompt, **found}, ensure_ascii=False), flush=True)
        if sys.stderr.isatty() and not sys.stdout.isatty():
            print(f"\r{number}/{len(prompts)}, {num_failed} failed", end="", file=sys.stderr, flush=True)
    return 1 if num_failed else 0
