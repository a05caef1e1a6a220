"""`pilotfish rollout`: other weights for a model that is served, a replica at a time, without an end of service."""

from __future__ import annotations

import argparse
import time

from ..common.errors import ConfigError
from ..controller.deployment import find
from ..models.store import resolve
from ..models.store_progress import terminal_progress
from .ray_session import NAMESPACE, cluster_session
from .terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a directory (on every node), a Hub id or an alias")
    parser.add_argument(
        "--model-version", required=True, metavar="TEXT", help="what these weights are called; another name than the last ones'"
    )
    parser.add_argument("--ray-address", metavar="ADDRESS", default="auto", help="auto: the Ray cluster of this machine")
    parser.add_argument("--ray-namespace", metavar="NAME", default=NAMESPACE, help="as given to 'pilotfish up'")
    parser.add_argument("--timeout-s", type=float, default=3600.0, metavar="X", help="for all replicas")
    parser.epilog = (
        "Run it where the controller runs. It needs room for one more replica. Exits 0 when all replicas have the new\n"
        "weights; if one cannot load them, the old ones are served on, and it says why. Streams stay with the version that\n"
        "they began on."
    )


def run(args: argparse.Namespace) -> int:
    start = time.monotonic()
    with cluster_session(address=args.ray_address, namespace=args.ray_namespace):
        deployment = find()
        if deployment is None:
            raise ConfigError(f"nothing is served in the Ray namespace {args.ray_namespace!r}: start with 'pilotfish up'")
        with terminal_progress() as progress:
            path = str(resolve(args.model, pull_missing=True, progress=progress).path)
        deployment.roll_out(args.model, model_path=path, version=args.model_version, timeout_s=args.timeout_s)
    say(f"Serving version {args.model_version} after {time.monotonic() - start:.1f} s")
    return 0
