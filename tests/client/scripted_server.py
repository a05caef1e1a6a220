"""A real gRPC server of pilotfish.v1.Inference whose answers the prompt chooses, and which notes what it saw.

Runs in a thread of the test process (`ScriptedServer`), or as a process of its own that prints its address.

Prompts: "count N" answers N tokens "1 " "2 " ...; "forever" goes on until it is cancelled; "fail CODE TIMES" fails TIMES times
with a pilotfish error, then counts to 3; "late CODE" fails after two tokens; "status NAME" ends with a plain gRPC status;
"gap", "unfinished" and "stray" break the protocol.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
from pilotfish.common.errors import error_from_code, status_row
from pilotfish.proto import common_pb2 as common
from pilotfish.proto import inference_pb2 as pb
from pilotfish.proto import inference_pb2_grpc


class ScriptedInference(inference_pb2_grpc.InferenceServicer):
    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str]] = []
        self.times_remaining: list[float | None] = []
        self.cancelled = threading.Event()
        self.failures_left: dict[str, int] = {}

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateEvents]:
        self._note(request, context)
        kind, *arguments = request.text.split() if request.text else ("count", "2")
        yield started(request.request_id or "made-here", request.model or "served")
        async for event in getattr(self, f"_{kind}")(request, context, *arguments):
            yield event

    async def Chat(self, request: pb.ChatRequest, context: Any) -> AsyncIterator[pb.GenerateEvents]:
        self._note(request, context)
        yield started("chat", "served")
        text = " | ".join(f"{message.role}: {message.content}" for message in request.messages)
        yield delta(0, [7], text, finish=common.FINISH_REASON_STOP)
        yield usage(1)

    async def Resume(self, request: pb.ResumeRequest, context: Any) -> AsyncIterator[pb.GenerateEvents]:
        self._note(request, context)
        await abort(context, "request_not_found")
        yield

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        self._note(request, context)
        if request.request_id == "slow":
            await asyncio.sleep(60)
        if request.request_id.startswith("fail"):
            await self._fail_once_per_budget(f"abort {request.request_id}", context, *request.request_id.split()[1:])
        return pb.AbortResponse(found=request.request_id == "known")

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        self._note(request, context)
        words = request.text.split() or [message.content for message in request.messages.messages]
        return pb.TokenizeResponse(token_ids=range(len(words)), tokens=[word.encode() for word in words])

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[pb.ModelCard(name="served", max_model_len=100)])

    async def ClusterStatus(self, request: pb.ClusterStatusRequest, context: Any) -> pb.ClusterStatusResponse:
        return pb.ClusterStatusResponse(model="served", replicas=[pb.ReplicaStatus(state=pb.REPLICA_STATE_READY)])

    async def _count(self, request: pb.GenerateRequest, context: Any, num_tokens: str) -> AsyncIterator[pb.GenerateEvents]:
        choices = request.sampling.n or 1
        last = int(num_tokens) - 1
        for offset in range(last + 1):
            for index in range(choices):
                finish = common.FINISH_REASON_LENGTH if offset == last else common.FINISH_REASON_UNSPECIFIED
                yield delta(offset, [offset + 10], f"{offset + 1} ", index=index, finish=finish)
        yield usage((last + 1) * choices)

    async def _forever(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateEvents]:
        try:
            for offset in range(10**9):
                yield delta(offset, [offset], f"{offset} ")
                await asyncio.sleep(0.01)
        finally:  # it never ends by itself
            self.cancelled.set()

    async def _fail(self, request: Any, context: Any, code: str, times: str) -> AsyncIterator[pb.GenerateEvents]:
        await self._fail_once_per_budget(request.text, context, code, times)
        async for event in self._count(request, context, "3"):
            yield event

    async def _fail_once_per_budget(self, key: str, context: Any, code: str, times: str) -> None:
        left = self.failures_left.setdefault(key, int(times))
        if left:
            self.failures_left[key] = left - 1
            await abort(context, code)

    async def _late(self, request: Any, context: Any, code: str) -> AsyncIterator[pb.GenerateEvents]:
        for offset in range(2):
            yield delta(offset, [offset], f"{offset} ")
        await abort(context, code)

    async def _status(self, request: Any, context: Any, name: str) -> AsyncIterator[pb.GenerateEvents]:
        await context.abort(grpc.StatusCode[name], f"said {name}")
        yield

    async def _gap(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateEvents]:
        yield delta(0, [1], "a")
        yield delta(2, [2], "b")

    async def _stray(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateEvents]:
        yield delta(0, [1], "a", index=3)

    async def _unfinished(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateEvents]:
        yield delta(0, [1], "a")

    def _note(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.times_remaining.append(context.time_remaining())


def started(request_id: str, model: str) -> pb.GenerateEvents:
    return pb.GenerateEvents(
        started=pb.RequestStarted(request_id=request_id, model=model, created_unix_s=1700000000, prompt_tokens=5)
    )


def delta(offset: int, token_ids: list[int], text: str, *, index: int = 0, finish: Any = 0) -> pb.GenerateEvents:
    logprobs = [
        common.TokenLogprob(
            token_id=token_id,
            logprob=-0.5,
            rank=1,
            token=b"t",
            top=[common.TopLogprob(token_id=token_id, logprob=-0.5, token=b"t")],
        )
        for token_id in token_ids
    ]
    return pb.GenerateEvents(
        deltas=[
            pb.TextDelta(index=index, offset=offset, token_ids=token_ids, text=text, logprobs=logprobs, finish_reason=finish)
        ]
    )


def usage(completion_tokens: int) -> pb.GenerateEvents:
    return pb.GenerateEvents(
        usage=pb.Usage(prompt_tokens=5, completion_tokens=completion_tokens, cached_tokens=4, ttft_ms=1.5, replica="r0")
    )


async def abort(context: Any, code: str) -> None:
    """As the gateway does it: the table's status, the class in trailing metadata."""
    error = error_from_code(code, f"the server says {code}")
    trailing = [("pilotfish-error-code", error.code)]
    if code == "overloaded":
        trailing.append(("pilotfish-retry-after-ms", "150"))
    await context.abort(grpc.StatusCode[status_row(error).grpc], error.message, tuple(trailing))


class ScriptedServer:
    """The server in a thread with an event loop of its own; `with ScriptedServer() as server: server.address`."""

    def __init__(self, credentials: Any = None, port: int = 0) -> None:
        self.inference = ScriptedInference()
        self.address = ""
        self._credentials = credentials
        self._wanted_port = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: Any = None

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(0), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    async def _start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.max_receive_message_length", 100_000)])
        inference_pb2_grpc.add_InferenceServicer_to_server(self.inference, self._server)
        wanted = f"127.0.0.1:{self._wanted_port}"
        if self._credentials is None:
            port = self._server.add_insecure_port(wanted)
        else:
            port = self._server.add_secure_port(wanted, self._credentials)
        await self._server.start()
        self.address = f"127.0.0.1:{port}"


if __name__ == "__main__":
    with ScriptedServer() as server:
        print(server.address, flush=True)
        sys.stdin.read()  # until the parent closes it, or kills this process
