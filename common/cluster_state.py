"""The cluster as a value: what the controller reports, `status` shows and ClusterStatusResponse mirrors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from .requests import EngineLoad, WorkerInfo
from .routing import RoutingState


class ReplicaState(StrEnum):
    """Where a replica is in its life; the moves between them are the table in controller/replica.py."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaStatus:
    """One replica, or one data rank of it (`name` ends in "/<data rank>"). `message` explains LOST and FAILED; `info` is None
    until its worker first started.

    `last_step_age_s` is the age of the step that runs now, 0 when idle. `paused_s` is how long the engine paused for the
    controller since its worker started. `num_generated_tokens` counts since the controller started, over the worker's restarts.
    `routing` is None while the router does not know it.
    """

    name: str
    state: ReplicaState
    message: str
    address: str
    node: str
    restarts: int
    info: WorkerInfo | None
    load: EngineLoad
    last_step_age_s: float
    last_step_id: int
    paused_s: float = 0.0
    num_generated_tokens: int = 0
    routing: RoutingState | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingState:
    """How many replicas are wanted, between which bounds (equal ones: a fixed number), and the last decision.

    Attributes:
        num_up, num_down: decisions for more and for fewer, since the controller started.
        reason: of the last decision, empty before the first; `decided_age_s` is its age.
    """

    min_replicas: int
    max_replicas: int
    num_wanted: int
    num_up: int = 0
    num_down: int = 0
    reason: str = ""
    decided_age_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayStatus:
    """A gateway process. `message` says why it is not connected; addresses are empty until it first was.

    `num_streams` are read through it now; `restarts` counts since the controller started.
    """

    name: str
    is_connected: bool
    message: str = ""
    grpc_address: str = ""
    http_address: str = ""
    pid: int = 0
    restarts: int = 0
    num_streams: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """A model that can be asked for by `name`."""

    name: str
    architecture: str
    max_model_len: int
    created_unix_s: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterState:
    """Everything at one moment. `num_queued` waits for a replica, `num_running` is on one; both count sequences (choices).

    Counts since the controller started: `num_prompt_tokens` of ended requests, of which a prefix cache saved
    `num_cached_tokens`; `num_generated_tokens` as they come. `gateways` is empty where the controller has the doors.
    """

    version: str
    model: str
    uptime_s: float
    replicas: tuple[ReplicaStatus, ...]
    scaling: ScalingState
    num_queued: int
    num_running: int
    generation_config: str
    sampling_defaults: Mapping[str, str]
    grpc_address: str
    http_address: str
    num_requests: int
    num_restarts: int
    controller_pid: int
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    gateways: tuple[GatewayStatus, ...] = ()
