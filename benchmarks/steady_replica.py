"""Replicas that compute nothing, for benchmarks of the controller: all on one event loop, as cheap as they can be.

What a controller sees of them is real: the Worker service over encrypted gRPC with its outbox and acknowledgements, a message
a step, cache events with true hashes. What is left out is the engine (threads, step scheduler), which in a cluster has machines
of its own and here would take the cores from the controller. Every running sequence gets one token in each step, and all steps
of a replica take the same time. Replicas that begin together step at moments of their own, as engines on machines of their own
do: in lockstep, which is how timers of one loop end, all tokens of the fleet would come at once and wait for each other.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
from pilotfish.common.hashing import block_hashes, root_hash
from pilotfish.common.identity import Identity
from pilotfish.common.requests import (
    BlockRemoved,
    BlockStored,
    EngineLoad,
    EngineRequest,
    FinishReason,
    KvEvent,
    SequenceOutput,
    ServingWorker,
    StepOutput,
    StepTimings,
    WorkerInfo,
)
from pilotfish.proto.credentials import server_credentials
from pilotfish.scheduler.snapshot import SchedulerSnapshot
from pilotfish.workers.timed_runner import VOCAB_SIZE
from pilotfish.workers.worker_service import ServerLimits, WorkerService

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class SteadyHealth:
    """An EngineHealth: there is nothing that could go wrong."""

    step_id: int
    ok: bool = True
    phase: str = "step"
    step_age_s: float = 0.0
    message: str = ""


@dataclass(frozen=True, slots=True)
class EmptySnapshot:
    """An EngineSnapshot before the first request."""

    step_id: int = 0
    scheduler: SchedulerSnapshot = field(default_factory=lambda: SchedulerSnapshot((), (), 1))


@dataclass(slots=True)
class _Sequence:
    """`tokens` are those behind the last full block, whose hash is `parent`."""

    request: EngineRequest
    tokens: list[int]
    parent: bytes
    num_output: int = 0


class SteadyEngine:
    """An EngineInterface. `on_step` gets a step every `step_s` while something runs; the oldest blocks of its cache leave."""

    def __init__(self, *, step_s: float, num_blocks: int, on_step: Callable[[StepOutput], None]) -> None:
        self._step_s = step_s
        self._num_blocks = num_blocks
        self._on_step = on_step
        self._running: dict[str, _Sequence] = {}
        self._aborted: list[str] = []
        self._cache: dict[bytes, None] = {}
        self._step_id = 0
        self._num_events = 0
        self._is_running = False
        self._is_paused = False
        self._due_s = 0.0

    def submit(self, request: EngineRequest) -> None:
        self._running[request.request_id] = _Sequence(request, list(request.prompt_token_ids), root_hash(request.salt))
        self._run()

    def pause(self, is_paused: bool) -> None:
        self._is_paused = is_paused
        self._run()

    def abort(self, request_id: str) -> None:
        self._aborted.append(request_id)

    def snapshot(self) -> EmptySnapshot:
        return EmptySnapshot()

    def health(self) -> SteadyHealth:
        return SteadyHealth(self._step_id)

    def _run(self) -> None:
        if self._running and not (self._is_running or self._is_paused):
            self._is_running = True
            loop = asyncio.get_running_loop()
            self._due_s = loop.time() + self._step_s * random.uniform(0.5, 1.5)
            loop.call_at(self._due_s, self._step)

    def _step(self) -> None:
        loop = asyncio.get_running_loop()
        self._step_id += 1
        events: list[KvEvent] = []
        num_prompt_tokens = 0
        outputs: list[SequenceOutput] = []
        for request_id in self._aborted:
            if (sequence := self._running.pop(request_id, None)) is not None:
                outputs.append(
                    SequenceOutput(request_id=request_id, offset=sequence.num_output, finish_reason=FinishReason.ABORT)
                )
        self._aborted.clear()
        for request_id, sequence in list(self._running.items()):
            offset = sequence.num_output
            if not offset:
                num_prompt_tokens += len(sequence.tokens) - 1
            token = (offset + len(sequence.tokens)) % VOCAB_SIZE
            if len(sequence.tokens) >= BLOCK_SIZE:
                self._store(sequence, events)
            sequence.tokens.append(token)
            sequence.num_output = offset + 1
            is_last = offset + 1 >= sequence.request.sampling.max_tokens
            if is_last:
                del self._running[request_id]
            reason = FinishReason.LENGTH if is_last else None
            outputs.append(SequenceOutput(request_id=request_id, offset=offset, token_ids=(token,), finish_reason=reason))
        first_event_id = self._num_events + 1
        self._num_events += len(events)
        self._on_step(
            StepOutput(
                step_id=self._step_id,
                sequences=tuple(outputs),
                first_event_id=first_event_id,
                kv_events=tuple(events),
                num_batched_tokens=num_prompt_tokens + len(outputs),
                timings=StepTimings(forward_ms=self._step_s * 1e3, total_ms=self._step_s * 1e3),
                load=EngineLoad(num_running=len(self._running), num_cached_blocks=len(self._cache)),
            )
        )
        if self._running and not self._is_paused:
            self._due_s += self._step_s * max(1, math.ceil((loop.time() - self._due_s) / self._step_s))
            loop.call_at(self._due_s, self._step)
        else:
            self._is_running = False

    def _store(self, sequence: _Sequence, events: list[KvEvent]) -> None:
        """Its full blocks become cached; for each that is too many one leaves, the end of a prompt before its beginning."""
        parent = sequence.parent
        hashes = block_hashes(sequence.tokens, BLOCK_SIZE, parent=parent)
        for block_hash in hashes:
            events.append(BlockStored(block_hash, parent))
            parent = block_hash
        sequence.parent = parent
        del sequence.tokens[: len(hashes) * BLOCK_SIZE]
        self._cache.update(dict.fromkeys(reversed(hashes)))
        while len(self._cache) > self._num_blocks:
            oldest = next(iter(self._cache))
            del self._cache[oldest]
            events.append(BlockRemoved(oldest))


def worker_info(*, max_num_seqs: int, num_blocks: int, epoch: int) -> WorkerInfo:
    return WorkerInfo(
        model_name="timed",
        model_path="",
        architecture="Timed",
        device="timed",
        dtype="float32",
        vocab_size=VOCAB_SIZE,
        max_model_len=32_768,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=2048,
        num_parameters=0,
        weight_bytes=0,
        kv_cache_bytes=0,
        load_seconds=0.0,
        epoch=epoch,
        pid=os.getpid(),
    )


class SteadyReplica:
    """One replica's server, on the running event loop: `await start()`."""

    def __init__(self, *, info: WorkerInfo, identity: Identity, step_s: float, on_step: Callable[[StepOutput], None]) -> None:
        self._info = info
        self._on_step = on_step
        engine = SteadyEngine(step_s=step_s, num_blocks=info.num_blocks, on_step=self._take_step)
        self._service = WorkerService(engine, info, limits=ServerLimits())
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((self._service.handlers(),))
        self._port = self._server.add_secure_port("127.0.0.1:0", server_credentials(identity))

    async def start(self) -> ServingWorker:
        await self._server.start()
        return ServingWorker(address=f"127.0.0.1:{self._port}", node="here", info=self._info)

    def _take_step(self, step: StepOutput) -> None:
        self._on_step(step)
        self._service.receive(step)
