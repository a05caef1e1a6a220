"""`pilotfish explain`: why the router sent a request where it went."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from ..client import Client, RouteDecision
from ..client.options import DEFAULT_PORT

_COLUMNS = ("queue_ms", "wait_ms", "prefill_ms", "work_ms", "tier_load_ms", "decode_ms", "cost_ms")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request_id", metavar="REQUEST_ID", help="as the server named it, or as the client did")
    parser.add_argument("--address", default=f"127.0.0.1:{DEFAULT_PORT}", help="host:port of the server's gRPC door")
    parser.add_argument("--json", action="store_true", help="print one JSON array instead of text")
    parser.epilog = "Exits 1 when the server keeps no choice for this request: it is unknown, still queued, or too long ago."


def run(args: argparse.Namespace) -> int:
    with Client(args.address) as client:
        decisions = client.explain_route(args.request_id)
    if args.json:
        print(json.dumps([_json_object(decision) for decision in decisions], indent=2))
    elif not decisions:
        print(
            f"pilotfish explain: no choice is kept for {args.request_id!r}: it is unknown, still queued, or too long ago",
            file=sys.stderr,
        )
    else:
        print("\n\n".join(decision_text(decision) for decision in decisions))
    return 0 if decisions else 1


def _json_object(decision: RouteDecision) -> dict[str, Any]:
    return {**dataclasses.asdict(decision), "scores": [score._asdict() for score in decision.scores]}


def decision_text(decision: RouteDecision) -> str:
    """The choice in one line, then a line for each replica, the cheapest first."""
    went = "is held for" if decision.is_held else "goes to"
    width = max(len("replica"), *(len(score.replica) for score in decision.scores))
    lines = [
        f"{decision.sequence_id}: {decision.num_tokens} tokens, {decision.expected_output_tokens:.0f} more expected, "
        f"{went} {decision.replica}",
        f"  {'replica':{width}}  cached" + "".join(f"{name.removesuffix('_ms'):>11}" for name in _COLUMNS) + "  (ms)",
    ]
    for score in sorted(decision.scores, key=lambda score: score.cost_ms):
        why = decision.why_not(score) or ("chosen" if score.replica == decision.replica else "")
        costs = "".join(f"{getattr(score, name):11.1f}" for name in _COLUMNS)
        lines.append(f"  {score.replica:{width}}  {score.matched_tokens:6}{costs}  {why}")
    return "\n".join(lines)
