"""Between the values of common/routing.py and their messages in inference.proto, both ways."""

from __future__ import annotations

from ..common.routing import RouteDecision, RouteScore, RoutingState
from . import inference_pb2

_STATE_FIELDS = tuple(RoutingState.__dataclass_fields__)
_SCORE_FIELDS = RouteScore._fields
_DECISION_FIELDS = tuple(name for name in RouteDecision.__dataclass_fields__ if name != "scores")


def routing_to_proto(state: RoutingState) -> inference_pb2.RoutingState:
    return inference_pb2.RoutingState(**{name: getattr(state, name) for name in _STATE_FIELDS})


def routing_from_proto(message: inference_pb2.RoutingState) -> RoutingState:
    return RoutingState(**{name: getattr(message, name) for name in _STATE_FIELDS})


def decision_to_proto(decision: RouteDecision) -> inference_pb2.RouteDecision:
    scores = [inference_pb2.RouteScore(**{name: getattr(score, name) for name in _SCORE_FIELDS}) for score in decision.scores]
    return inference_pb2.RouteDecision(scores=scores, **{name: getattr(decision, name) for name in _DECISION_FIELDS})


def decision_from_proto(message: inference_pb2.RouteDecision) -> RouteDecision:
    scores = tuple(RouteScore(**{name: getattr(score, name) for name in _SCORE_FIELDS}) for score in message.scores)
    return RouteDecision(scores=scores, **{name: getattr(message, name) for name in _DECISION_FIELDS})
