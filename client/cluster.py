"""The cluster's state and the models served, from their messages."""

from __future__ import annotations

from ..common.cluster_state import ClusterState, ModelCard, ReplicaState, ReplicaStatus, ScalingState
from ..common.errors import InternalError
from ..proto import codec
from ..proto import inference_pb2 as pb
from ..proto.routing_codec import routing_from_proto

_PREFIX = "REPLICA_STATE_"


def cluster_state(message: pb.ClusterStatusResponse) -> ClusterState:
    return ClusterState(
        version=message.version,
        model=message.model,
        uptime_s=message.uptime_s,
        replicas=tuple(map(_replica, message.replicas)),
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
    )


def model_card(message: pb.ModelCard) -> ModelCard:
    return ModelCard(
        name=message.name,
        architecture=message.architecture,
        max_model_len=message.max_model_len,
        created_unix_s=message.created_unix_s,
    )


def _replica(message: pb.ReplicaStatus) -> ReplicaStatus:
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
