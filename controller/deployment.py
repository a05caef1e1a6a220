"""The controller as who starts it sees it: deploy, wait until it serves, ask, shut down.

Ray must have been started or joined (`ray.init` with a namespace of its own for each cluster). One controller a namespace.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import Any

import ray
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..common.cluster_state import ClusterState
from ..common.config import GatewayConfig, ServeConfig
from ..common.errors import ConfigError, InternalError, PilotfishError, Unavailable
from . import grpc_wakeups
from .actor import ControllerActor
from .authority import Authority
from .layouts import settle_device
from .ports import hold
from .service import Addresses

CONTROLLER_NAME = "controller"
_CALL_TIMEOUT_S = 30.0
_END_TIMEOUT_S = 20.0


class Deployment:
    """A controller in the current Ray namespace."""

    def __init__(self, handle: ActorHandle) -> None:
        self._handle = handle

    def wait_ready(self, *, timeout_s: float) -> Addresses:
        """Until every replica serves.

        Raises:
            PilotfishError: why it cannot (a port in use, a checkpoint that does not load, ...).
        """
        return self._get(self._handle.wait_ready.remote(), timeout_s)

    def status(self) -> ClusterState:
        return self._get(self._handle.status.remote(), _CALL_TIMEOUT_S)

    def roll_out(self, model: str, *, model_path: str, version: str, timeout_s: float) -> None:
        """Serve other weights under the same name; returns when all replicas have them.

        Raises:
            Unavailable: not within `timeout_s`; it goes on.
            PilotfishError: see `Controller.roll_out`.
        """
        self._get(self._handle.roll_out.remote(model, model_path, version), timeout_s)

    def shutdown(self, *, grace_s: float = 0.0) -> None:
        """End the controller and every worker, whatever state they are in; running requests get `grace_s` first."""
        with contextlib.suppress(PilotfishError):
            self._get(self._handle.shutdown.remote(grace_s), grace_s + _CALL_TIMEOUT_S)
        ray.kill(self._handle, no_restart=True)
        end_actors()

    @staticmethod
    def _get(reference: Any, timeout_s: float) -> Any:
        try:
            return ray.get(reference, timeout=timeout_s)
        except GetTimeoutError:
            raise Unavailable(f"the controller did not answer within {timeout_s:g} s; its log has more") from None
        except RayTaskError as error:
            if isinstance(error.cause, PilotfishError):
                raise error.cause from None
            raise InternalError(f"the controller failed: {error.cause!r}") from error
        except RayError as error:
            raise Unavailable(f"the controller cannot be reached: {error}") from error


def deploy(config: ServeConfig, *, model_path: str, worker_class: ActorClass) -> Deployment:
    """Start a controller on this node; it starts its workers. Returns at once.

    Args:
        model_path: the model's directory on this node, for its tokenizer, template and generation configuration.
        worker_class: `ray.remote` of workers.actor.WorkerActor.

    Raises:
        ConfigError: a controller runs in this namespace already, or Ray's nodes are too few or too small for the ranks.
    """
    if find() is not None:
        raise ConfigError("this Ray cluster serves a model already: stop that one first, or use another Ray namespace")
    device = settle_device(config, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    config = replace(config, engine=replace(config.engine, device=device), gateway=_with_ports(config.gateway))
    variables = grpc_wakeups.ray_environment()
    handle = (
        ray.remote(ControllerActor)
        .options(
            name=CONTROLLER_NAME,
            lifetime="detached",
            max_restarts=-1,
            num_cpus=0,
            max_concurrency=1000,
            runtime_env={"env_vars": variables} if variables else {},
            scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
        )
        .remote(config, model_path, worker_class, Authority.create())
    )
    return Deployment(handle)


def find() -> Deployment | None:
    """The controller of the current namespace, if there is one."""
    try:
        return Deployment(ray.get_actor(CONTROLLER_NAME))
    except ValueError:
        return None


def end_actors() -> None:
    """Kill every named actor of the current namespace, and remove the placement groups of replicas.

    Raises:
        Unavailable: some are still there after _END_TIMEOUT_S.
    """
    deadline = time.monotonic() + _END_TIMEOUT_S
    while names := ray.util.list_named_actors():
        if time.monotonic() > deadline:
            raise Unavailable(f"Ray has not ended these actors within {_END_TIMEOUT_S:g} s: {', '.join(sorted(names))}")
        for name in names:
            with contextlib.suppress(ValueError):  # it has ended meanwhile
                ray.kill(ray.get_actor(name))
        time.sleep(0.1)
    for group in ray.util.placement_group_table().values():
        if group["state"] != "REMOVED" and group["name"]:
            with contextlib.suppress(ValueError):  # of another namespace, or it is gone
                ray.util.remove_placement_group(ray.util.get_placement_group(group["name"]))


def _with_ports(gateway: GatewayConfig) -> GatewayConfig:
    """A restarted controller must find the ports of the first one: 0 is settled before it starts.

    Raises:
        ConfigError: a port that gateway processes are to share is in use; they would share it with whoever has it.
    """
    names = ["grpc_port", "http_port", "link_port"] if gateway.num_gateways else ["grpc_port", "http_port"]
    ports = {}
    with contextlib.ExitStack() as held:  # all held until all are known: they must differ
        for name in names:
            if (port := getattr(gateway, name)) == 0 or gateway.num_gateways:
                host = "127.0.0.1" if name == "link_port" else gateway.host
                listener = held.enter_context(hold(host, port, flag=f"--{name.replace('_', '-')}"))
                ports[name] = listener.getsockname()[1]
    return replace(gateway, **ports)
