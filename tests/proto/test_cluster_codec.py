import pytest
from pilotfish.common.cluster_state import ClusterState, GatewayStatus, ModelCard, ReplicaState, ReplicaStatus, ScalingState
from pilotfish.common.errors import InternalError
from pilotfish.common.requests import EngineLoad, WorkerInfo
from pilotfish.common.routing import RoutingState
from pilotfish.proto import inference_pb2 as pb
from pilotfish.proto.cluster_codec import card_from_proto, card_to_proto, status_from_proto, status_to_proto

INFO = WorkerInfo(
    model_name="m",
    model_path="/models/m",
    architecture="LlamaForCausalLM",
    device="cpu",
    dtype="float32",
    vocab_size=49152,
    max_model_len=8192,
    block_size=16,
    num_blocks=100,
    max_num_seqs=64,
    max_num_batched_tokens=2048,
    num_parameters=134_515_008,
    weight_bytes=269_030_016,
    kv_cache_bytes=1 << 30,
    load_seconds=1.5,
    kernels={"cpu": "C++"},
    epoch=3,
    pid=42,
)

ROUTING = RoutingState(
    num_requests=3,
    num_held=1,
    queued_tokens=70,
    expected_blocks=9,
    drift_requests=1,
    drift_tokens=-4,
    drift_blocks=2,
    ms_per_token=0.25,
    step_overhead_ms=4.5,
    num_indexed_blocks=12,
    num_snapshots=1,
)


def replica(state: ReplicaState, info: WorkerInfo | None) -> ReplicaStatus:
    return ReplicaStatus(
        name=f"r-{state}",
        state=state,
        message="because",
        address="127.0.0.1:7",
        node="n",
        restarts=2,
        info=info,
        load=EngineLoad(num_running=1, num_free_blocks=98, num_used_blocks=2),
        last_step_age_s=0.25,
        last_step_id=9,
        paused_s=1.5,
        num_generated_tokens=70,
        routing=ROUTING if info else None,
    )


def test_the_controllers_state_arrives_whole():
    state = ClusterState(
        version="1.2",
        model="m",
        uptime_s=3.5,
        replicas=tuple(replica(state, None if state == ReplicaState.STARTING else INFO) for state in ReplicaState),
        scaling=ScalingState(
            min_replicas=0, max_replicas=8, num_wanted=3, num_up=5, num_down=2, reason="a burst", decided_age_s=1.5
        ),
        num_queued=1,
        num_running=2,
        generation_config="openai",
        sampling_defaults={"temperature": "1.0"},
        grpc_address="127.0.0.1:50051",
        http_address="127.0.0.1:8000",
        num_requests=12,
        num_restarts=1,
        controller_pid=99,
        num_prompt_tokens=40,
        num_cached_tokens=16,
        num_generated_tokens=80,
        gateways=(GatewayStatus(name="gateway-0", is_connected=True, grpc_address="127.0.0.1:1", pid=7, num_streams=2),),
    )
    assert status_from_proto(pb.ClusterStatusResponse.FromString(status_to_proto(state).SerializeToString())) == state


def test_model_cards_arrive_whole():
    card = ModelCard(name="m", architecture="LlamaForCausalLM", max_model_len=8192, created_unix_s=1700000000)
    assert card_from_proto(card_to_proto(card)) == card


@pytest.mark.parametrize("value", [0, 77])
def test_a_state_of_another_version_is_named(value):
    message = pb.ClusterStatusResponse(replicas=[pb.ReplicaStatus(state=value)])
    with pytest.raises(InternalError, match=f"replica state {value}, which this client does not know"):
        status_from_proto(message)
