"""The bound of a controller: a grpc.aio server that does nothing but answer, with the benchmark's messages and clients.

`with BareServer() as server:` runs it in a process of its own. A call for one token is answered in one message, any other with
one message of a token after the other, as fast as they go. `server.cpu_s()`: CPU time so far.
"""

from __future__ import annotations

import asyncio
import multiprocessing
from multiprocessing.connection import Connection
from types import TracebackType

import grpc
from pilotfish.controller import grpc_wakeups
from pilotfish.proto import common_pb2
from pilotfish.proto import inference_pb2 as pb
from timed_fleet import cpu_seconds_of

_START_S = 60.0
_PROCESSES = multiprocessing.get_context("spawn")


def _serve(parent: Connection) -> None:
    last = pb.TextDelta(token_ids=[1], text="a", finish_reason=common_pb2.FINISH_REASON_LENGTH)
    usage = pb.Usage(prompt_tokens=64, completion_tokens=1, queue_ms=1.5, ttft_ms=1.5, total_ms=1.5, replica="replica-0")
    started = pb.RequestStarted(request_id="r12345", model="timed", created_unix_s=1_800_000_000, prompt_tokens=64)
    whole = pb.GenerateEvents(started=started, deltas=[last], usage=usage).SerializeToString()
    token = pb.GenerateEvents(deltas=[pb.TextDelta(offset=1000, token_ids=[1], text="a")]).SerializeToString()

    async def generate(_messages: object, context: grpc.aio.ServicerContext) -> None:
        request = pb.GenerateRequest.FromString(await context.read())
        if request.sampling.max_tokens == 1:
            await context.write(whole)
        else:
            while True:
                await context.write(token)

    async def serve() -> None:
        grpc_wakeups.take_all_at_once(asyncio.get_running_loop())
        server = grpc.aio.server()
        handlers = {"Generate": grpc.stream_stream_rpc_method_handler(generate)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("pilotfish.v1.Inference", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        parent.send(f"127.0.0.1:{port}")
        await asyncio.Event().wait()

    asyncio.run(serve())


class BareServer:
    """See the module. `address` is there inside of the `with` block."""

    def __init__(self) -> None:
        self._ours, theirs = _PROCESSES.Pipe()
        self._process = _PROCESSES.Process(target=_serve, args=(theirs,), daemon=True)
        self.address = ""

    def __enter__(self) -> BareServer:
        self._process.start()
        if not self._ours.poll(_START_S):
            raise SystemExit(f"the bare server did not serve within {_START_S:g} s")
        self.address = self._ours.recv()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()

    def cpu_s(self) -> float:
        return cpu_seconds_of(self._process.pid)
