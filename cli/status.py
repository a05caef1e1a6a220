"""`pilotfish status`: a running cluster at a glance."""

from __future__ import annotations

import argparse
import dataclasses
import json

from ..client import Client, ClusterState, GatewayStatus, ReplicaState, ReplicaStatus, ScalingState
from ..client.options import DEFAULT_PORT, RetryPolicy
from ..common.errors import ConfigError
from .status_watch import watch

_WATCH_TIMEOUT_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", default=f"127.0.0.1:{DEFAULT_PORT}", help="host:port of the server's gRPC door")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--watch", action="store_true", help="show a table, again and again, until Ctrl-C")
    parser.add_argument("--interval-s", type=_interval, default=1.0, metavar="X", help="between two looks of --watch")
    parser.epilog = "Exits 1 when no replica is ready; --watch exits 0 at Ctrl-C."


def run(args: argparse.Namespace) -> int:
    if args.watch:
        if args.json:
            raise ConfigError("--watch and --json do not go together: take --json without --watch, as often as you like")
        with Client(args.address, retry=RetryPolicy(max_attempts=1), short_timeout_s=_WATCH_TIMEOUT_S) as client:
            return watch(client, interval_s=args.interval_s)
    with Client(args.address) as client:
        state = client.status()
    print(json.dumps(dataclasses.asdict(state), indent=2, default=dict) if args.json else _text(state))
    return 0 if any(replica.state is ReplicaState.READY for replica in state.replicas) else 1


def _interval(text: str) -> float:
    seconds = float(text)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.1 and 3600 seconds")
    return seconds


def _text(state: ClusterState) -> str:
    source = "the checkpoint's generation_config" if state.generation_config == "model" else "OpenAI's"
    defaults = ", ".join(f"{name}={value}" for name, value in sorted(state.sampling_defaults.items()))
    lines = [
        f"model               {state.model}",
        f"version             {state.version}, up {_duration(state.uptime_s)}",
        f"gRPC, HTTP          {state.grpc_address}, {state.http_address}",
        f"sampling defaults   {source}: {defaults}",
        f"sequences           {state.num_running} running, {state.num_queued} queued",
        f"requests, restarts  {state.num_requests}, {state.num_restarts}",
        f"replicas            {_scaling(state.scaling)}",
    ]
    lines += map(_gateway_line, state.gateways)
    return "\n".join(lines + [line for replica in state.replicas for line in _replica_lines(replica)])


def _scaling(scaling: ScalingState) -> str:
    if scaling.min_replicas == scaling.max_replicas:
        return f"{scaling.num_wanted}, a fixed number"
    text = f"{scaling.num_wanted} wanted, {scaling.min_replicas} to {scaling.max_replicas} allowed"
    return text + (f"; {scaling.reason} ({_duration(scaling.decided_age_s)} ago)" if scaling.reason else "")


def _gateway_line(gateway: GatewayStatus) -> str:
    if not gateway.is_connected:
        return f"{gateway.name:<19} not connected: {gateway.message}"
    restarted = f", restarted {gateway.restarts} times" if gateway.restarts else ""
    addresses = f"{gateway.grpc_address}, {gateway.http_address}"
    return f"{gateway.name:<19} {addresses}, {gateway.num_streams} streams, process {gateway.pid}{restarted}"


def _replica_lines(replica: ReplicaStatus) -> list[str]:
    version = f" (version {replica.info.model_version})" if replica.info and replica.info.model_version else ""
    head = f"{replica.name}: {replica.state}{version}" + (f", {replica.message}" if replica.message else "")
    head += f", restarted {replica.restarts} times" if replica.restarts else ""
    lines = ["", head]
    info, load = replica.info, replica.load
    if info is not None:
        of_ranks = f" on the first of {info.num_ranks} ranks" if info.num_ranks > 1 else ""
        lines += [
            f"  {info.architecture}, {info.num_parameters / 1e6:.0f} M parameters{of_ranks}, {info.dtype} on {info.device}, "
            f"loaded in {info.load_seconds:.1f} s",
            f"  up to {info.max_num_seqs} sequences of {info.max_model_len} tokens, "
            f"{info.max_num_batched_tokens} tokens a step",
            f"  kernels: {', '.join(f'{device}: {backend}' for device, backend in info.kernels.items())}",
        ]
    total = load.num_free_blocks + load.num_cached_blocks + load.num_used_blocks
    if info is not None and total:
        lines.append(
            f"  KV cache {info.kv_cache_bytes / 2**30:.2f} GiB: {total} blocks, {load.num_used_blocks} used, "
            f"{load.num_cached_blocks} cached, {load.num_free_blocks} free"
        )
    if (balance := load.expert_balance) is not None:
        lines.append(
            f"  experts: the fullest rank had {balance.measured:.2f} of the mean load; {balance.num_moves} have moved, "
            f"last by step {balance.last_step_id}, for {balance.expected:.2f}"
        )
    if (routing := replica.routing) is not None:
        lines.append(
            f"  routed there: {routing.num_requests} sequences ({routing.num_held} more are held for it), "
            f"{routing.queued_tokens} prompt tokens to compute; {routing.num_indexed_blocks} blocks in the router's index; "
            f"drift {routing.drift_requests} sequences, {routing.drift_tokens} tokens, {routing.drift_blocks} blocks"
        )
    running = f"in step {replica.last_step_id} for {replica.last_step_age_s:.1f} s" if replica.last_step_age_s else "idle"
    lines.append(
        f"  {load.num_running} running, {load.num_waiting} waiting, {load.num_preemptions} preemptions, {running}; "
        f"at {replica.address} on node {replica.node}"
    )
    return lines


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
