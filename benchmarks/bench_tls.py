"""What encryption between a worker and the controller costs: a step's message up a gRPC stream, encrypted and in the clear.

Run `python benchmarks/bench_tls.py`; it needs neither a model nor a GPU. A process that stands for a worker sends the message
of a step that decodes, as often as a step would, stamped with a clock that both processes share; the reader subtracts when it
has parsed the message. CPU time is of both processes and includes gRPC's own threads. The two ways take turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection

import grpc
from pilotfish.common.identity import Identity
from pilotfish.common.requests import SequenceOutput, StepOutput
from pilotfish.controller.authority import Authority
from pilotfish.proto import worker_pb2, worker_pb2_grpc
from pilotfish.proto.codec import step_to_proto
from pilotfish.proto.credentials import channel_credentials, channel_options, server_credentials

NUM_WARM_UP = 100
NAME = "replica-0.1.0"


class Sender(worker_pb2_grpc.WorkerServicer):
    """Answers Connect with steps, one each interval; the time of sending is the step's id."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args

    async def Connect(
        self,
        request_iterator: AsyncIterator[worker_pb2.ControllerMessage],  # noqa: ARG002 - a sender only
        context: grpc.aio.ServicerContext,  # noqa: ARG002
    ) -> AsyncIterator[worker_pb2.WorkerMessage]:
        outputs = [SequenceOutput(request_id=f"request-{i}#0", offset=900, token_ids=(i,)) for i in range(self._args.sequences)]
        message = worker_pb2.WorkerMessage(step=step_to_proto(StepOutput(step_id=1, sequences=tuple(outputs))))
        for _ in range(self._args.steps + NUM_WARM_UP):
            await asyncio.sleep(self._args.interval_ms / 1000)
            message.step.step_id = time.monotonic_ns()
            yield message


async def serve(pipe: Connection, args: argparse.Namespace, identity: Identity) -> None:
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(Sender(args), server)
    clear, encrypted = (
        server.add_insecure_port("127.0.0.1:0"),
        server.add_secure_port("127.0.0.1:0", server_credentials(identity)),
    )
    await server.start()
    pipe.send((clear, encrypted))
    while await asyncio.to_thread(pipe.recv):
        pipe.send(time.process_time())


def run_server(pipe: Connection, args: argparse.Namespace, identity: Identity) -> None:
    asyncio.run(serve(pipe, args, identity))


async def read(port: int, credentials: grpc.ChannelCredentials | None, pipe: Connection) -> dict[str, float]:
    def cpu_s() -> float:
        pipe.send(True)
        return time.process_time() + pipe.recv()

    address, options = f"127.0.0.1:{port}", channel_options(NAME)
    channel = (
        grpc.aio.insecure_channel(address, options)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials, options)
    )
    times_us, start_s = [], 0.0
    async with channel:
        async for message in worker_pb2_grpc.WorkerStub(channel).Connect():
            times_us.append((time.monotonic_ns() - message.step.step_id) / 1e3)
            if len(times_us) == NUM_WARM_UP:
                start_s = cpu_s()
        used_s = cpu_s() - start_s
    times_us = sorted(times_us[NUM_WARM_UP:])
    return {
        "p50_us": statistics.median(times_us),
        "p99_us": times_us[int(len(times_us) * 0.99)],
        "cpu_us_a_step": used_s / len(times_us) * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--interval-ms", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    authority = Authority.create()
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=run_server, args=(theirs, args, authority.issue(NAME)))
    process.start()
    clear, encrypted = ours.recv()
    for _ in range(args.rounds):
        for way, port in (("clear", clear), ("encrypted", encrypted)):
            credentials = channel_credentials(authority.issue("controller")) if way == "encrypted" else None
            row = asyncio.run(read(port, credentials, ours))
            print(json.dumps({"way": way, "sequences": args.sequences} | {name: round(us, 1) for name, us in row.items()}))
    ours.send(False)
    process.join(10)


if __name__ == "__main__":
    main()
