"""One Connect call to a worker as a controller makes it, and everything it brought; for tests of the protocol."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from parts import open_channel
from pilotfish.common.requests import EngineLoad, EngineRequest, KvEvent, SequenceOutput, TokenSampling
from pilotfish.proto import worker_pb2, worker_pb2_grpc
from pilotfish.proto.codec import request_to_proto, step_from_proto

PROMPT = [5, 6, 7, 8]


@dataclass
class Session:
    """Makes sure of what every reader relies on: events without a gap, tokens (in `tokens`) neither missing nor twice."""

    call: grpc.aio.StreamStreamCall
    steps: list[int] = field(default_factory=list)
    outputs: list[SequenceOutput] = field(default_factory=list)
    heartbeats: list[worker_pb2.Heartbeat] = field(default_factory=list)
    kv_events: list[KvEvent] = field(default_factory=list)
    next_event_id: int | None = None
    load: EngineLoad = field(default_factory=EngineLoad)

    async def send(self, **message: object) -> None:
        await self.call.write(worker_pb2.ControllerMessage(**message))

    async def submit(
        self,
        request_id: str,
        *,
        max_tokens: int = 5,
        prompt: Sequence[int] = PROMPT,
        outputs: Sequence[int] = (),
        deadline_ms: float | None = None,
        **sampling: Any,
    ) -> None:
        request = EngineRequest(
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            output_token_ids=tuple(outputs),
            deadline_ms=deadline_ms,
            sampling=TokenSampling(**{"temperature": 0.0, "max_tokens": max_tokens, "seed": 0, **sampling}),
        )
        await self.send(submits=[request_to_proto(request)])

    async def receive_until(self, done: Callable[[Session], bool]) -> None:
        async with asyncio.timeout(60):
            while not done(self):
                message = await self.call.read()
                assert message is not grpc.aio.EOF, "the worker ended the stream"
                for step in message.steps:
                    self._take(step)
                if message.HasField("heartbeat"):
                    self.heartbeats.append(message.heartbeat)

    async def finish(self, request_id: str) -> SequenceOutput:
        """The last output of a request."""
        await self.receive_until(lambda s: any(o.request_id == request_id and o.finish_reason for o in s.outputs))
        return next(output for output in self.outputs if output.request_id == request_id and output.finish_reason)

    def tokens(self, request_id: str, *, start: int = 0) -> list[int]:
        """All its tokens from output `start` on; fails if one is missing or comes twice."""
        tokens: list[int] = []
        for output in self.outputs:
            if output.request_id == request_id and output.token_ids:
                assert output.offset == start + len(tokens)
                tokens.extend(output.token_ids)
        return tokens

    def _take(self, message: worker_pb2.Step) -> None:
        step = step_from_proto(message)
        self.steps.append(step.step_id)
        self.outputs.extend(step.sequences)
        self.load = step.load
        if step.kv_events:
            assert self.next_event_id in (None, step.first_event_id)
            self.next_event_id = step.first_event_id + len(step.kv_events)
            self.kv_events.extend(step.kv_events)


@asynccontextmanager
async def session(address: str, *, acked_step_id: int = 0, epoch: int = 3, controller_id: str = "c") -> AsyncIterator[Session]:
    async with open_channel(address) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Connect()
        made = Session(call)
        await made.send(attach=worker_pb2.Attach(epoch=epoch, acked_step_id=acked_step_id, controller_id=controller_id))
        async with asyncio.timeout(60):
            hello = await call.read()
        assert hello.HasField("hello")
        assert hello.hello.info.epoch == epoch
        yield made
        call.cancel()
