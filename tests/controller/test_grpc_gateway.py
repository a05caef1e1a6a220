"""The gRPC door over a whole controller: through the SDK, and with bytes that no SDK would send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from fake_engine import expected_tokens
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from local_workers import Cluster, StartCluster
from pilotfish.client import AsyncClient, FinishReason, ReplicaState, RetryPolicy
from pilotfish.common.errors import DeadlineExceeded, InvalidRequest, ModelNotFound, PilotfishError
from pilotfish.proto import inference_pb2 as pb
from reading import eventually

PROMPT = [5, 6, 7, 8]
GENERATE = "/pilotfish.v1.Inference/Generate"


@pytest.fixture
async def cluster(start_cluster: StartCluster) -> Cluster:
    return await start_cluster(step_s=0.002)


@pytest.fixture
async def client(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.service.addresses.grpc, timeout_s=20, retry=RetryPolicy(max_attempts=1)) as client:
        yield client


def used_blocks(cluster: Cluster) -> int:
    return cluster.launcher.launched[0].engine.scheduler.load().num_used_blocks


async def raw_error(cluster: Cluster, data: bytes) -> tuple[grpc.StatusCode, dict[str, str], str]:
    async with grpc.aio.insecure_channel(cluster.service.addresses.grpc) as channel:
        call = channel.unary_stream(GENERATE)(data, timeout=20)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        return caught.value.code(), dict(caught.value.trailing_metadata()), caught.value.details()


async def test_generate_streams_tokens_text_and_usage(cluster: Cluster, client: AsyncClient) -> None:
    stream = client.stream_generate(PROMPT, max_tokens=30, temperature=0, logprobs=0, n=2)
    offsets: dict[int, int] = {0: 0, 1: 0}
    async for delta in stream:
        assert not delta.token_ids or delta.offset == offsets[delta.index]
        offsets[delta.index] += len(delta.token_ids)
    completion = stream.completion
    for choice in completion.choices:
        assert list(choice.token_ids) == expected_tokens(PROMPT, 30)
        assert choice.finish_reason is FinishReason.LENGTH
        assert [entry.logprob for entry in choice.logprobs] == [-1.0] * 30
        assert all(entry.token for entry in choice.logprobs)
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (4, 60)
    assert 0 < completion.usage.ttft_ms <= completion.usage.total_ms
    assert completion.usage.replica


@pytest.mark.parametrize("resumable", [False, True])
async def test_the_start_is_said_alone_only_to_who_can_come_back(cluster: Cluster, resumable: bool) -> None:
    engine = cluster.launcher.launched[0].engine
    engine.gate.clear()
    request = pb.GenerateRequest(tokens=pb.TokenIds(ids=PROMPT), resumable=resumable)
    request.sampling.max_tokens = 1
    async with asyncio.timeout(20), grpc.aio.insecure_channel(cluster.service.addresses.grpc) as channel:
        call = channel.unary_stream(GENERATE, pb.GenerateRequest.SerializeToString, pb.GenerateEvents.FromString)(request)
        if resumable:
            start = await call.read()
            assert start.HasField("started")
            assert not start.deltas
        await eventually(lambda: len(engine.submitted) == 1)
        engine.gate.set()
        last = await call.read()
        assert last.HasField("started") != resumable
        assert [list(delta.token_ids) for delta in last.deltas] == [expected_tokens(PROMPT, 1)]
        assert last.usage.completion_tokens == 1
        assert await call.read() is grpc.aio.EOF


async def test_chat_tokenize_models_status_and_abort(cluster: Cluster, client: AsyncClient) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    tokens = await client.tokenize(messages)
    completion = await client.chat(messages, max_tokens=5)
    assert b"".join(tokens.tokens) == b"<user>Hi\n<assistant>"
    assert completion.usage.prompt_tokens == len(tokens.token_ids)
    assert [card.name for card in await client.models()] == ["tiny"]
    status = await client.status()
    assert [replica.state for replica in status.replicas] == [ReplicaState.READY]
    assert (status.generation_config, status.sampling_defaults["temperature"]) == ("openai", "1.0")
    assert status.grpc_address == cluster.service.addresses.grpc
    task = asyncio.create_task(client.generate(PROMPT, max_tokens=4000, request_id="long"))
    await eventually(lambda: used_blocks(cluster) > 0)
    assert await client.abort("long")
    assert not await client.abort("unknown")
    with pytest.raises(PilotfishError, match="aborted"):
        await task
    await eventually(lambda: used_blocks(cluster) == 0)


async def test_leaving_a_stream_frees_the_blocks_within_two_steps(cluster: Cluster, client: AsyncClient) -> None:
    engine = cluster.launcher.launched[0].engine
    stream = client.stream_generate(PROMPT, max_tokens=4000)
    async for _ in stream:
        break
    await stream.aclose()
    await eventually(lambda: len(engine.aborted) == 1)
    aborted_at = engine.health().step_id
    await eventually(lambda: used_blocks(cluster) == 0)
    assert engine.health().step_id <= aborted_at + 2


async def test_the_clients_deadline_ends_the_request_on_the_worker(cluster: Cluster, client: AsyncClient) -> None:
    engine = cluster.launcher.launched[0].engine
    engine.step_s = 0.01
    with pytest.raises(DeadlineExceeded):
        await client.generate(PROMPT, max_tokens=4000, timeout_s=1.0)
    assert engine.submitted[0].deadline_ms <= 1020  # gRPC sends 1000.1 ms as 1010: hundredths of a second, rounded up
    await eventually(lambda: used_blocks(cluster) == 0)


async def test_typed_errors_reach_the_client(cluster: Cluster, client: AsyncClient) -> None:
    with pytest.raises(ModelNotFound, match="large"):
        await client.generate("x", model="large")
    with pytest.raises(InvalidRequest, match="empty"):
        await client.generate("")
    with pytest.raises(InvalidRequest, match="5000"):
        await client.generate("x", max_tokens=5000)
    with pytest.raises(InvalidRequest, match="min_tokens"):
        await client.generate("x", {"min_tokens": 4096, "max_tokens": 4095})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x1a\x02\xff\xfe", "UTF-8"),
        (b"\x00\x01garbage", "not a valid GenerateRequest"),
        (pb.GenerateRequest(text="x").SerializeToString() + b"\xf8\x07\x01", "unknown field number 127"),
        (pb.GenerateRequest().SerializeToString(), "prompt is missing"),
    ],
)
async def test_malformed_messages_get_typed_errors(cluster: Cluster, data: bytes, message: str) -> None:
    code, metadata, details = await raw_error(cluster, data)
    assert (code, metadata["pilotfish-error-code"]) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_request")
    assert message in details


async def test_an_unknown_field_inside_the_sampling_parameters_is_refused(cluster: Cluster) -> None:
    sampling = b"\x2a\x03\xf8\x07\x01"  # field 5 of the request, with field 127 in it
    _, _, details = await raw_error(cluster, pb.GenerateRequest(text="x").SerializeToString() + sampling)
    assert "SamplingParams has the unknown field number 127" in details


async def test_a_message_of_100_mb_is_refused_and_the_next_call_works(cluster: Cluster, client: AsyncClient) -> None:
    with pytest.raises(PilotfishError) as caught:
        await client.generate("x" * 100_000_000)
    assert caught.value.code == "request_too_large"
    assert (await client.generate("x", max_tokens=1)).token_ids


async def test_health_and_reflection(cluster: Cluster) -> None:
    async with grpc.aio.insecure_channel(cluster.service.addresses.grpc) as channel:
        call = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service="pilotfish.v1.Inference"), timeout=20
        )
        while (await call.read()).status != health_pb2.HealthCheckResponse.SERVING:
            pass  # the door opens before the first replica is ready
        call.cancel()
        stream = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=20)
        await stream.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        services = (await stream.read()).list_services_response.service
        await stream.done_writing()
    assert "pilotfish.v1.Inference" in [service.name for service in services]
