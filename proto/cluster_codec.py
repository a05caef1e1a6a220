"""Between the cluster's state and the models served, and their messages, both ways."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..common.cluster_state import ClusterState, GatewayStatus, ModelCard, ReplicaState, ReplicaStatus, ScalingState
from ..common.errors import InternalError
from . import codec
from . import inference_pb2 as pb
from .routing_codec import routing_from_proto, routing_to_proto

_PREFIX = "REPLICA_STATE_"
_STATES = {
    ReplicaState.STARTING: pb.REPLICA_STATE_STARTING,
    ReplicaState.READY: pb.REPLICA_STATE_READY,
    ReplicaState.DRAINING: pb.REPLICA_STATE_DRAINING,
    ReplicaState.LOST: pb.REPLICA_STATE_LOST,
    ReplicaState.FAILED: pb.REPLICA_STATE_FAILED,
}
_GATEWAY_FIELDS = tuple(GatewayStatus.__dataclass_fields__)


def status_to_proto(state: ClusterState) -> pb.ClusterStatusResponse:
    return pb.ClusterStatusResponse(
        version=state.version,
        model=state.model,
        uptime_s=state.uptime_s,
        replicas=[_replica_to_proto(replica) for replica in state.replicas],
        scaling=pb.ScalingState(**dataclasses.asdict(state.scaling)),
        num_queued=state.num_queued,
        num_running=state.num_running,
        generation_config=state.generation_config,
        sampling_defaults=state.sampling_defaults,
        grpc_address=state.grpc_address,
        http_address=state.http_address,
        num_requests=state.num_requests,
        num_restarts=state.num_restarts,
        controller_pid=state.controller_pid,
        num_prompt_tokens=state.num_prompt_tokens,
        num_cached_tokens=state.num_cached_tokens,
        num_generated_tokens=state.num_generated_tokens,
        gateways=[pb.GatewayStatus(**_gateway_fields(gateway)) for gateway in state.gateways],
    )


def status_from_proto(message: pb.ClusterStatusResponse) -> ClusterState:
    return ClusterState(
        version=message.version,
        model=message.model,
        uptime_s=message.uptime_s,
        replicas=tuple(map(_replica_from_proto, message.replicas)),
        scaling=_scaling(message.scaling),
        num_queued=message.num_queued,
        num_running=message.num_running,
        generation_config=message.generation_config,
        sampling_defaults=dict(message.sampling_defaults),
        grpc_address=message.grpc_address,
        http_address=message.http_address,
        num_requests=message.num_requests,
        num_restarts=message.num_restarts,
        controller_pid=message.controller_pid,
        num_prompt_tokens=message.num_prompt_tokens,
        num_cached_tokens=message.num_cached_tokens,
        num_generated_tokens=message.num_generated_tokens,
        gateways=tuple(GatewayStatus(**_gateway_fields(gateway)) for gateway in message.gateways),
    )


def _gateway_fields(gateway: GatewayStatus | pb.GatewayStatus) -> dict[str, Any]:
    return {name: getattr(gateway, name) for name in _GATEWAY_FIELDS}


def card_to_proto(card: ModelCard) -> pb.ModelCard:
    return pb.ModelCard(
        name=card.name, architecture=card.architecture, max_model_len=card.max_model_len, created_unix_s=card.created_unix_s
    )


def card_from_proto(message: pb.ModelCard) -> ModelCard:
    return ModelCard(
        name=message.name,
        architecture=message.architecture,
        max_model_len=message.max_model_len,
        created_unix_s=message.created_unix_s,
    )


def _replica_to_proto(replica: ReplicaStatus) -> pb.ReplicaStatus:
    return pb.ReplicaStatus(
        name=replica.name,
        state=_STATES[replica.state],
        message=replica.message,
        address=replica.address,
        node=replica.node,
        restarts=replica.restarts,
        info=None if replica.info is None else codec.info_to_proto(replica.info),
        load=codec.load_to_proto(replica.load),
        last_step_age_s=replica.last_step_age_s,
        last_step_id=replica.last_step_id,
        paused_s=replica.paused_s,
        num_generated_tokens=replica.num_generated_tokens,
        routing=None if replica.routing is None else routing_to_proto(replica.routing),
    )


def _replica_from_proto(message: pb.ReplicaStatus) -> ReplicaStatus:
    return ReplicaStatus(
        name=message.name,
        state=_state(message.state),
        message=message.message,
        address=message.address,
        node=message.node,
        restarts=message.restarts,
        info=codec.info_from_proto(message.info) if message.HasField("info") else None,
        load=codec.load_from_proto(message.load),
        last_step_age_s=message.last_step_age_s,
        last_step_id=message.last_step_id,
        paused_s=message.paused_s,
        num_generated_tokens=message.num_generated_tokens,
        routing=routing_from_proto(message.routing) if message.HasField("routing") else None,
    )


def _scaling(message: pb.ScalingState) -> ScalingState:
    return ScalingState(
        min_replicas=message.min_replicas,
        max_replicas=message.max_replicas,
        num_wanted=message.num_wanted,
        num_up=message.num_up,
        num_down=message.num_down,
        reason=message.reason,
        decided_age_s=message.decided_age_s,
    )


def _state(value: int) -> ReplicaState:
    try:
        return ReplicaState(pb.ReplicaState.Name(value).removeprefix(_PREFIX).lower())  # type: ignore[arg-type]
    except ValueError as error:
        raise InternalError(f"the server reports the replica state {value}, which this client does not know") from error
