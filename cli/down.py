"""`pilotfish down`: ends what `pilotfish up` started, whatever state it is in."""

from __future__ import annotations

import argparse

from ..controller.deployment import end_actors, find
from .ray_session import NAMESPACE, cluster_session
from .terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ray-address", metavar="ADDRESS", default="auto", help="auto: the Ray cluster of this machine")
    parser.add_argument("--ray-namespace", metavar="NAME", default=NAMESPACE, help="as given to 'pilotfish up'")
    parser.add_argument("--grace-s", type=float, default=5.0, metavar="X", help="for requests that still run")
    parser.epilog = "Exits 0 when nothing is left, also where nothing was. Ray itself goes on; 'ray down' ends that."


def run(args: argparse.Namespace) -> int:
    with cluster_session(address=args.ray_address, namespace=args.ray_namespace):
        deployment = find()
        if deployment is not None:
            deployment.shutdown(grace_s=args.grace_s)
        else:  # workers may have outlived their controller
            end_actors()
    said = "Ended" if deployment is not None else "Nothing is served in"
    say(f"{said} Ray namespace {args.ray_namespace!r}")
    return 0
