"""What a gRPC call gets in its reader's turns, where its client is slow or gone."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import grpc
from fake_engine import expected_tokens
from local_workers import Cluster, StartCluster
from pilotfish.proto import inference_pb2 as pb
from reading import eventually
from tcp_proxy import TcpProxy

NUM_TOKENS = 400
NUM_CHOICES = 16
# For what is not read. Once in 50 runs of a busy machine it is 64 KiB all the same.
SMALL_WINDOW = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
REQUEST = pb.GenerateRequest(
    tokens={"ids": [1]}, sampling={"max_tokens": NUM_TOKENS, "n": NUM_CHOICES, "logprobs": 0, "ignore_eos": True}
)


def begin(channel: grpc.aio.Channel) -> grpc.aio.StreamStreamCall:
    method = channel.stream_stream("/pilotfish.v1.Inference/Generate", pb.GenerateRequest.SerializeToString)
    return method(iter([REQUEST]), timeout=60)


def has_answered(cluster: Cluster) -> bool:
    engine = cluster.launcher.launched[0].engine
    return engine.health().step_id >= NUM_TOKENS and engine.scheduler.load().num_used_blocks == 0


async def test_a_slow_client_gets_fewer_messages_with_every_token(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    async with asyncio.timeout(60), grpc.aio.insecure_channel(cluster.service.addresses.grpc, options=SMALL_WINDOW) as channel:
        call = begin(channel)
        messages = [pb.GenerateEvents.FromString(await call.read())]
        await eventually(lambda: has_answered(cluster))
        while (data := await call.read()) is not grpc.aio.EOF:
            messages.append(pb.GenerateEvents.FromString(data))
        assert await call.code() is grpc.StatusCode.OK
    got: list[list[int]] = [[] for _ in range(NUM_CHOICES)]
    for delta in (delta for message in messages for delta in message.deltas):
        assert not delta.token_ids or delta.offset == len(got[delta.index])
        got[delta.index] += delta.token_ids
    assert got == [expected_tokens([1], NUM_TOKENS)] * NUM_CHOICES
    assert messages[-1].usage.completion_tokens == NUM_CHOICES * NUM_TOKENS
    # What the window takes, then one with the rest: five or so, and 310 where it is of 64 KiB; unmerged two a token.
    assert len(messages) < NUM_TOKENS


async def test_a_client_that_is_gone_while_messages_wait_for_it_leaves_nothing(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    engine = cluster.launcher.launched[0].engine
    proxy = TcpProxy(cluster.service.addresses.grpc)
    address = await proxy.start()
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    async with asyncio.timeout(60):
        async with grpc.aio.insecure_channel(address, options=SMALL_WINDOW) as channel:
            calls = [begin(channel) for _ in range(3)]
            for call in calls:
                await call.read()
            handling = {task for task in asyncio.all_tasks() if task.get_name().startswith("HandleExceptions")}
            assert len(handling) == len(calls)
            await eventually(lambda: engine.health().step_id > NUM_TOKENS // 2)
            proxy.cut()
            await eventually(lambda: all(task.done() for task in handling))
            await eventually(lambda: engine.scheduler.load().num_used_blocks == 0)
        await proxy.stop()
    handling.clear()
    gc.collect()
    await asyncio.sleep(0)
    assert not complaints
