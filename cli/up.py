"""`pilotfish up`: a model on a Ray cluster that runs already; it goes on serving when the command has returned."""

from __future__ import annotations

import argparse
import time

import ray

from ..common.errors import ConfigError, Unavailable
from ..controller.deployment import deploy, find
from ..workers.actor import WorkerActor
from . import config_flags
from .ray_session import NAMESPACE, cluster_session
from .served_model import find_served_model
from .terminal import end_as_with_ctrl_c, say

_POLL_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "pilotfish up MODEL [options]"
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a directory (on every node), a Hub id or an alias")
    parser.add_argument("--ray-address", metavar="ADDRESS", default="auto", help="auto: the Ray cluster of this machine")
    parser.add_argument("--ray-namespace", metavar="NAME", default=NAMESPACE, help="one controller serves in each")
    parser.add_argument("--wait-nodes", type=int, default=0, metavar="N", help="wait until Ray has so many, the head too")
    parser.add_argument("--wait-timeout-s", type=float, default=600.0, metavar="X", help="of that wait")
    config_flags.add_arguments(parser)
    parser.epilog = (
        "The controller runs on the node where this command does. Exits 0 when every replica serves; otherwise everything\n"
        "that was started has been ended again. Ask with 'pilotfish status', end with 'pilotfish down'."
    )


def run(args: argparse.Namespace) -> int:
    config = config_flags.serve_config(args)
    end_as_with_ctrl_c()
    start = time.monotonic()
    with cluster_session(address=args.ray_address, namespace=args.ray_namespace):
        if find() is not None:
            raise ConfigError(
                f"the Ray namespace {args.ray_namespace!r} serves a model already: end it with 'pilotfish down' first, "
                "or use another --ray-namespace"
            )
        _wait_for_nodes(args.wait_nodes, args.wait_timeout_s)
        model_path = find_served_model(config)
        say(f"Starting {config.fleet.num_replicas} x {config.model.name}")
        deployment = deploy(config, model_path=model_path, worker_class=ray.remote(WorkerActor))
        try:
            addresses = deployment.wait_ready(timeout_s=config.fleet.start_timeout_s)
        except BaseException:
            deployment.shutdown()
            raise
    say(
        f"Serving {config.model.name} after {time.monotonic() - start:.1f} s\n"
        f"  gRPC  {addresses.grpc}\n  HTTP  http://{addresses.http}/v1\n"
        f"Ask:    pilotfish status --address {addresses.grpc}\nStop:   pilotfish down"
    )
    return 0


def _wait_for_nodes(num_wanted: int, timeout_s: float) -> None:
    deadline, num_said = time.monotonic() + timeout_s, -1
    while (num_nodes := sum(node["Alive"] for node in ray.nodes())) < num_wanted:
        if time.monotonic() > deadline:
            raise Unavailable(
                f"Ray has {num_nodes} of {num_wanted} nodes after {timeout_s:g} s (--wait-timeout-s); "
                "on the head, `ray status` and the monitor's log in /tmp/ray/session_latest/logs say why"
            )
        if num_nodes != num_said:
            say(f"Ray has {num_nodes} of {num_wanted} nodes; waiting")
            num_said = num_nodes
        time.sleep(_POLL_S)
