"""The SDK: grpcio and protobuf are all it needs.

`Client` for threads, `AsyncClient` for asyncio; errors are the classes of `pilotfish.common.errors`.
"""

from ..common.cluster_state import ClusterState, GatewayStatus, ModelCard, ReplicaState, ReplicaStatus, ScalingState
from ..common.requests import FinishReason
from ..common.routing import RouteDecision, RouteScore, RoutingState
from ..common.sampling_params import SamplingParams
from .async_client import AsyncClient
from .async_text_stream import AsyncTextStream
from .client import Client
from .options import ChannelOptions, RetryPolicy, TlsOptions
from .results import Choice, Completion, Delta, Logprob, Tokenization, TopLogprob, Usage
from .text_stream import TextStream

__all__ = [
    "AsyncClient",
    "AsyncTextStream",
    "ChannelOptions",
    "Choice",
    "Client",
    "ClusterState",
    "Completion",
    "Delta",
    "FinishReason",
    "GatewayStatus",
    "Logprob",
    "ModelCard",
    "ReplicaState",
    "ReplicaStatus",
    "RetryPolicy",
    "RouteDecision",
    "RouteScore",
    "RoutingState",
    "SamplingParams",
    "ScalingState",
    "TextStream",
    "TlsOptions",
    "Tokenization",
    "TopLogprob",
    "Usage",
]
