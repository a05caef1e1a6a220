"""What tests on a Ray of their own have in common: a configuration, and clients that read on threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grpc
from pilotfish.common.cluster_state import ClusterState, ReplicaState
from pilotfish.common.config import EngineConfig, FleetConfig, GatewayConfig, ModelConfig, ParallelConfig, ServeConfig
from pilotfish.common.errors import PilotfishError
from pilotfish.controller.deployment import Deployment
from pilotfish.controller.service import Addresses
from pilotfish.proto import inference_pb2 as pb
from pilotfish.proto import inference_pb2_grpc

PROMPT = "It was a dark and stormy night"


@dataclass
class Served:
    deployment: Deployment
    addresses: Addresses


def config(
    model_path: Path,
    *,
    num_replicas: int = 2,
    grpc_port: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
    num_gateways: int = 0,
    heartbeat_timeout_s: float = 10.0,
    **parallel: Any,
) -> ServeConfig:
    return ServeConfig(
        model=ModelConfig(model=str(model_path), served_name="tiny"),
        engine=EngineConfig(device=device, num_kv_blocks=512, num_threads=1, max_num_seqs=8),
        gateway=GatewayConfig(grpc_port=grpc_port, http_port=0, num_gateways=num_gateways),
        parallel=ParallelConfig(**parallel),
        fleet=FleetConfig(num_replicas=num_replicas, heartbeat_timeout_s=heartbeat_timeout_s),
    )


class Reader(threading.Thread):
    """A client's stream, read to its end on a thread."""

    def __init__(self, served: Served, *, max_tokens: int, prompt: str = PROMPT) -> None:
        super().__init__(daemon=True)
        self._channel = grpc.insecure_channel(served.addresses.grpc)
        request = pb.GenerateRequest(text=prompt)
        request.sampling.max_tokens = max_tokens
        request.sampling.temperature = 0.0
        request.sampling.ignore_eos = True
        self._call = inference_pb2_grpc.InferenceStub(self._channel).Generate(request, timeout=60)
        self.token_ids: list[int] = []
        self.text = ""
        self.usage: pb.Usage | None = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            for events in self._call:
                for delta in events.deltas:
                    assert not delta.token_ids or delta.offset == len(self.token_ids)
                    self.token_ids.extend(delta.token_ids)
                    self.text += delta.text
                if events.HasField("usage"):
                    self.usage = events.usage
        except Exception as error:  # noqa: BLE001 - handed to the thread of the test
            self.error = error

    def wait_for(self, num_tokens: int) -> None:
        wait_until(lambda: len(self.token_ids) >= num_tokens or not self.is_alive(), "tokens")
        assert self.is_alive(), f"the stream ended early: {self.error}"

    def refused(self) -> bool:
        """Whether it ended because the server takes no more requests."""
        self.join(60)
        self._channel.close()
        return isinstance(self.error, grpc.RpcError) and self.error.code() is grpc.StatusCode.UNAVAILABLE

    def finish(self) -> Reader:
        self.join(60)
        self._channel.close()
        assert self.error is None, self.error
        assert self.usage is not None
        return self


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 60) -> None:
    deadline, pause_s = time.monotonic() + timeout_s, 0.02
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(pause_s)
        pause_s = min(1.2 * pause_s, 0.25)  # the cluster that it asks has better things to do


def all_ready(deployment: Deployment, *, restarts: int) -> bool:
    try:
        state: ClusterState = deployment.status()
    except PilotfishError:
        return False
    return state.num_restarts == restarts and all(r.state is ReplicaState.READY for r in state.replicas)
