"""`pilotfish serve`: a controller and its workers, in the foreground until Ctrl-C."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from ..common.cluster_state import ReplicaState
from ..common.config import ServeConfig
from ..common.errors import InternalError, Unavailable
from ..controller.deployment import Deployment, deploy
from ..controller.service import Addresses
from ..workers.actor import WorkerActor
from . import config_flags
from .ray_session import NAMESPACE, ray_session
from .served_model import find_served_model
from .terminal import end_as_with_ctrl_c, say

_WATCH_INTERVAL_S = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "pilotfish serve MODEL [options]"
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a local directory, a Hub id, a .gguf file or an alias")
    parser.add_argument(
        "--ray-address", metavar="ADDRESS", help="a Ray cluster to join; default: one that runs here, else a new one"
    )
    parser.add_argument("--ray-namespace", metavar="NAME", default=NAMESPACE, help="one controller serves in each")
    parser.add_argument("--grace-s", type=float, default=5.0, metavar="X", help="at the end, for requests that still run")
    config_flags.add_arguments(parser)
    parser.epilog = "Ctrl-C (or SIGTERM) stops serving and ends everything that was started; a second one does not wait."


def run(args: argparse.Namespace) -> int:
    config = config_flags.serve_config(args)
    end_as_with_ctrl_c()
    start = time.monotonic()
    model_path = find_served_model(config)
    say(f"Starting {config.fleet.num_replicas} x {config.model.name}")
    with (
        ray_session(address=args.ray_address, namespace=args.ray_namespace),
        deployed(config, model_path=model_path, grace_s=args.grace_s) as (deployment, addresses),
    ):
        say(
            f"Serving {config.model.name} after {time.monotonic() - start:.1f} s\n"
            f"  gRPC  {addresses.grpc}\n  HTTP  http://{addresses.http}/v1\n"
            f"Try:    pilotfish chat --address {addresses.grpc}\nStop:   Ctrl-C"
        )
        try:
            _watch(deployment)
        except KeyboardInterrupt:
            say(f"Stopping; running requests get {args.grace_s:g} s")
    return 0


@contextmanager
def deployed(config: ServeConfig, *, model_path: str, grace_s: float = 0.0) -> Iterator[tuple[Deployment, Addresses]]:
    """A model that is served inside the block, and nothing of it afterwards.

    Raises:
        PilotfishError: why it cannot be served.
    """
    deployment = deploy(config, model_path=model_path, worker_class=ray.remote(WorkerActor))
    try:
        yield deployment, deployment.wait_ready(timeout_s=config.fleet.start_timeout_s)
    finally:
        deployment.shutdown(grace_s=grace_s)


def _watch(deployment: Deployment) -> None:
    """Until interrupted, or until every replica was given up."""
    while True:
        time.sleep(_WATCH_INTERVAL_S)
        try:
            state = deployment.status()
        except Unavailable as error:  # the controller is being restarted
            say(f"No answer from the controller: {error}")
            continue
        is_fixed = state.scaling.min_replicas == state.scaling.max_replicas  # else others are started in their place
        if is_fixed and all(replica.state is ReplicaState.FAILED for replica in state.replicas):
            raise InternalError("every replica was given up: " + "; ".join(f"{r.name}: {r.message}" for r in state.replicas))
