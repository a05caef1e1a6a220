"""What one controller process can carry: requests admitted and routed, tokens delivered to streams, the delay it adds, memory.

    python benchmarks/bench_controller.py [--seconds 20] [--requests 100000] [--model smollm2-135m] [--parts requests ...]

Replicas compute nothing (steady_replica.py) and live in one process, the controller in another, the clients in this one; all
over real gRPC (the parts `http`: HTTP), between controller and replicas encrypted. The clients are as cheap as they can be
(raw_grpc.py, raw_http.py), but for the part `sdk`, which measures the SDK's. The three processes share the machine's cores:
rates are lower bounds, and the CPU time of each process for a request or a token says what they could do without the others.
Tokens are counted at the client; the delay of one is from the step that made it to the arrival of its message, on one machine's
clock. Each part prints whether what is asked for was met, and the program ends with 1 if one was not.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from bare_server import BareServer
from pilotfish.client import AsyncClient
from pilotfish.models.store import resolve
from pilotfish.proto import common_pb2
from pilotfish.proto import inference_pb2 as pb
from pilotfish.workers.timed_runner import VOCAB_SIZE
from raw_grpc import Call, RawConnection
from raw_http import RawStream
from timed_fleet import FleetSettings, TimedFleet

METHOD = "/pilotfish.v1.Inference/Generate"
NUM_STREAMS = 500
NUM_CALLERS = 128
NUM_CONNECTIONS = 4
TARGET_REQUESTS_PER_S = 1500
TARGET_TOKENS_PER_S = 20_000
TARGET_P99_MS = 50
MAX_GROWTH = 1.03
PROMPT_TOKENS = 64
GATEWAY_TOKENS_PER_S = 3_000  # so few that each token is a message, also where all processes share two cores
PARTS = ("requests", "tokens", "latency", "memory", "sdk", "http-requests", "http-tokens", "gateways", "bound")
_TOKEN_OF_BYTE = bytes(byte % VOCAB_SIZE for byte in range(256))


class Load:
    """The clients: requests with random prompts, in turns over a few connections."""

    def __init__(self, connections: list[RawConnection]) -> None:
        self._rng = random.Random(0)
        self._numbers = itertools.count()
        self._connections = itertools.cycle(connections)
        self._options: dict[int, bytes] = {}

    def begin(self, max_tokens: int, on_end: Callable[[Call], None]) -> tuple[str, Call]:
        """A request's id and its call."""
        request_id = f"r{next(self._numbers)}"
        if max_tokens not in self._options:
            sampling = common_pb2.SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
            self._options[max_tokens] = pb.GenerateRequest(sampling=sampling).SerializeToString()
        # Token ids below 128 are their own varints: `tokens` is the random bytes in two frames, which saves the client's time.
        prompt = self._rng.randbytes(PROMPT_TOKENS).translate(_TOKEN_OF_BYTE)
        name = pb.GenerateRequest(request_id=request_id).SerializeToString()
        message = name + bytes((0x22, len(prompt) + 2, 0x0A, len(prompt))) + prompt + self._options[max_tokens]
        return request_id, next(self._connections).begin(message, on_end)

    async def requests(self, num_callers: int, go_on: Callable[[], bool]) -> list[float]:
        """Callers that ask for one token, and again as soon as they have it, while `go_on`; what each took, in milliseconds."""
        times_ms: list[float] = []
        all_ended = asyncio.get_running_loop().create_future()
        num_active = num_callers

        def ask() -> None:
            nonlocal num_active
            if not go_on():
                num_active -= 1
                if not num_active and not all_ended.done():
                    all_ended.set_result(None)
                return
            asked_s = time.monotonic()

            def ended(call: Call) -> None:
                if num_tokens(call) == 1:
                    times_ms.append((time.monotonic() - asked_s) * 1e3)
                    ask()
                elif not all_ended.done():
                    all_ended.set_exception(RuntimeError(f"a request ended after {call.messages}"))

            self.begin(1, ended)

        for _ in range(num_callers):
            ask()
        await all_ended
        return times_ms


def num_tokens(call: Call) -> int:
    return sum(len(delta.token_ids) for _, data in call.messages for delta in pb.GenerateEvents.FromString(data).deltas)


async def bench_requests(fleet: TimedFleet, load: Load, *, seconds: float) -> dict[str, object]:
    until_s = time.monotonic() + 2
    await load.requests(NUM_CALLERS, lambda: time.monotonic() < until_s)
    before, start_s = cpu_seconds(fleet), time.monotonic()
    times_ms = await load.requests(NUM_CALLERS, lambda: time.monotonic() < start_s + seconds)
    rate = len(times_ms) / (time.monotonic() - start_s)
    return {
        "callers": NUM_CALLERS,
        "requests_per_s": round(rate),
        **cpu_per(fleet, before, len(times_ms), "request"),
        **percentiles("total_ms", times_ms),
        "asked_for": f"{TARGET_REQUESTS_PER_S} requests/s",
        "met": rate >= TARGET_REQUESTS_PER_S,
    }


async def bench_tokens(fleet: TimedFleet, load: Load, *, seconds: float, offered_per_s: float) -> dict[str, object]:
    """NUM_STREAMS long streams; counts what arrives after all have begun, and how late it is."""
    ended: list[Call] = []
    fleet.emissions()
    calls = [load.begin(10_000, ended.append) for _ in range(NUM_STREAMS)]
    async with asyncio.timeout(120):
        while not all(len(call.messages) > 1 for _, call in calls):  # noqa: ASYNC110 - no event counts them
            await asyncio.sleep(0.1)
    await asyncio.sleep(2)
    gc.disable()  # looking through all that has arrived would hold up what arrives, by a tenth of a second
    begins = [len(call.messages) for _, call in calls]
    before, start_s = cpu_seconds(fleet), time.monotonic()
    await asyncio.sleep(seconds)
    spent_s, ends = time.monotonic() - start_s, [len(call.messages) for _, call in calls]
    gc.enable()
    emitted_s = await asyncio.to_thread(fleet.emissions)
    assert not ended, f"{len(ended)} streams have ended"
    delays_ms: list[float] = []
    for (request_id, call), begin, end in zip(calls, begins, ends, strict=True):
        for arrived_s, data in call.messages[begin:end]:
            for delta in pb.GenerateEvents.FromString(data).deltas:
                offsets = range(delta.offset, delta.offset + len(delta.token_ids))
                delays_ms += ((arrived_s - emitted_s[request_id, offset]) * 1e3 for offset in offsets)
    rate = len(delays_ms) / spent_s
    is_late = offered_per_s < TARGET_TOKENS_PER_S
    delays = percentiles("added_ms", delays_ms)
    return {
        "streams": NUM_STREAMS,
        "offered_tokens_per_s": offered_per_s,
        "made_tokens_per_s": round(sum(start_s <= at_s < start_s + spent_s for at_s in emitted_s.values()) / spent_s),
        "delivered_tokens_per_s": round(rate),
        "tokens_per_message": round(len(delays_ms) / max(sum(ends) - sum(begins), 1), 2),
        **cpu_per(fleet, before, len(delays_ms), "token"),
        **delays,
        "asked_for": f"p99 below {TARGET_P99_MS} ms" if is_late else f"{TARGET_TOKENS_PER_S} tokens/s",
        "met": delays["added_ms_p99"] < TARGET_P99_MS and rate > 0.98 * offered_per_s
        if is_late
        else rate >= TARGET_TOKENS_PER_S,
    }


async def bench_memory(fleet: TimedFleet, load: Load, *, num_requests: int) -> dict[str, object]:
    """The controller's memory over many requests, in ten readings: flat, if the second half ends about where it began."""
    readings: list[float] = []
    start_s = time.monotonic()
    for _ in range(10):
        left = iter(range(num_requests // 10))
        await load.requests(NUM_CALLERS, lambda left=left: next(left, None) is not None)
        readings.append(round(fleet.controller_rss_mib(), 1))
        print(f"{readings[-1]} MiB after {len(readings) * (num_requests // 10)} requests", file=sys.stderr, flush=True)
    return {
        "requests": num_requests,
        "rss_mib": readings,
        "seconds": round(time.monotonic() - start_s),
        "asked_for": f"the last reading within {MAX_GROWTH - 1:.0%} of the fifth",
        "met": readings[-1] <= MAX_GROWTH * readings[4],
    }


async def bench_sdk(fleet: TimedFleet, *, seconds: float) -> dict[str, object]:
    """What a token costs the SDK's asyncio client."""
    num_received = 0

    async def read(client: AsyncClient) -> None:
        nonlocal num_received
        async for delta in client.stream_generate([1, 2, 3], max_tokens=10_000, temperature=0, ignore_eos=True):
            num_received += len(delta.token_ids)

    async with AsyncClient(fleet.addresses[0]) as client:
        tasks = [asyncio.create_task(read(client)) for _ in range(NUM_STREAMS // 5)]
        await asyncio.sleep(2)
        first, before = num_received, cpu_seconds(fleet)
        await asyncio.sleep(seconds)
        result = {"streams": len(tasks), **cpu_per(fleet, before, num_received - first, "token")}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return result


class HttpLoad:
    """The clients of the HTTP door: completions over kept connections, one call at a time on each."""

    def __init__(self, streams: list[RawStream]) -> None:
        self.streams = streams
        self._numbers = itertools.count()
        self._until_s = 0.0
        self._times_ms: list[float] = []

    async def requests(self, num_callers: int, *, seconds: float) -> list[float]:
        """Callers that ask for one token, and again as soon as they have it; what each took, in milliseconds."""
        self._until_s, self._times_ms = time.monotonic() + seconds, []
        for stream in self.streams[:num_callers]:
            self._ask(stream)
        await asyncio.sleep(seconds)
        return self._times_ms

    def _ask(self, stream: RawStream) -> None:
        if (asked_s := time.monotonic()) < self._until_s:
            self.begin(stream, 1, lambda ended: self._note(ended, asked_s))

    def _note(self, stream: RawStream, asked_s: float) -> None:
        if stream.num_events != 1:
            raise SystemExit(f"a request ended after {stream.parts}")
        self._times_ms.append((time.monotonic() - asked_s) * 1e3)
        self._ask(stream)

    def begin(self, stream: RawStream, max_tokens: int, on_end: Callable[[RawStream], None]) -> None:
        prompt = [next(self._numbers) % VOCAB_SIZE, *range(PROMPT_TOKENS - 1)]
        fields = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        stream.begin(json.dumps(fields).encode(), on_end)


async def bench_http_requests(fleet: TimedFleet, load: HttpLoad, *, seconds: float) -> dict[str, object]:
    await load.requests(NUM_CALLERS, seconds=2)
    await asyncio.sleep(1)
    before = cpu_seconds(fleet)
    times_ms = await load.requests(NUM_CALLERS, seconds=seconds)
    return {
        "callers": NUM_CALLERS,
        "requests_per_s": round(len(times_ms) / seconds),
        **cpu_per(fleet, before, len(times_ms), "request"),
        **percentiles("total_ms", times_ms),
    }


async def bench_http_tokens(fleet: TimedFleet, load: HttpLoad, *, seconds: float) -> dict[str, object]:
    """Long streams, each of whose messages is counted."""
    for stream in load.streams:
        load.begin(stream, 10_000, lambda _: None)
    await asyncio.sleep(5)
    before, begin, start_s = cpu_seconds(fleet), sum(stream.num_events for stream in load.streams), time.monotonic()
    await asyncio.sleep(seconds)
    spent_s, num_events = time.monotonic() - start_s, sum(stream.num_events for stream in load.streams) - begin
    return {
        "streams": len(load.streams),
        "messages_per_s": round(num_events / spent_s),
        **cpu_per(fleet, before, num_events, "message"),
    }


HTTP_PARTS = {"http-requests": bench_http_requests, "http-tokens": bench_http_tokens}


def cpu_seconds(fleet: TimedFleet) -> dict[str, float]:
    """CPU time so far, by process."""
    return {
        "controller": fleet.controller_cpu_s(),
        "gateways": fleet.gateways_cpu_s(),
        "replicas": fleet.replicas_cpu_s(),
        "clients": time.process_time(),
    }


def cpu_per(fleet: TimedFleet, before: dict[str, float], number: int, what: str) -> dict[str, float]:
    """CPU time of each process since then, in microseconds a piece."""
    now = cpu_seconds(fleet)
    return {f"{name}_cpu_us_per_{what}": round((now[name] - before[name]) / max(number, 1) * 1e6, 1) for name in now}


def percentiles(name: str, values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"{name}_p{p}": round(ordered[min(len(ordered) * p // 100, len(ordered) - 1)], 1) for p in (50, 99) if ordered}


def run(
    part: str,
    path: str,
    *,
    seconds: float,
    num_requests: int,
    num_gateways: int = 0,
    tokens_per_s: float | None = None,
) -> dict[str, Any]:
    """One part with a fleet of its own."""
    offered = (
        tokens_per_s or {"tokens": 1.1, "latency": 0.5, "sdk": 0.1, "http-tokens": 0.25}.get(part, 5.0) * TARGET_TOKENS_PER_S
    )

    async def measure(fleet: TimedFleet) -> dict[str, object]:
        if part == "sdk":
            return await bench_sdk(fleet, seconds=seconds)
        if part in HTTP_PARTS:
            streams = [await RawStream.open(fleet.http_address, "/v1/completions") for _ in range(NUM_STREAMS)]
            try:
                return await HTTP_PARTS[part](fleet, HttpLoad(streams), seconds=seconds)
            finally:
                for stream in streams:
                    stream.close()
        turns = itertools.islice(itertools.cycle(fleet.addresses), NUM_CONNECTIONS)
        connections = [await RawConnection.open(address, METHOD) for address in turns]
        load = Load(connections)
        try:
            if part == "requests":
                return await bench_requests(fleet, load, seconds=seconds)
            if part == "memory":
                return await bench_memory(fleet, load, num_requests=num_requests)
            return await bench_tokens(fleet, load, seconds=seconds, offered_per_s=offered)
        finally:
            for connection in connections:
                connection.close()

    num_kv_blocks = 2048 if part == "memory" else 100_000  # full soon: the router's index grows with the caches until then
    settings = FleetSettings(path=path, step_s=NUM_STREAMS / offered, num_kv_blocks=num_kv_blocks, num_gateways=num_gateways)
    with TimedFleet(settings) as fleet:
        before = os.getloadavg()[0]
        result = asyncio.run(measure(fleet))
    return {
        "part": part,
        "gateways": num_gateways,
        **result,
        "load_average": [round(before, 1), round(os.getloadavg()[0], 1)],
        "cores": os.cpu_count(),
    }


def run_bound(*, seconds: float) -> dict[str, Any]:
    """What grpc.aio alone allows here: calls of one message, and messages to NUM_STREAMS streams that nothing else holds up."""

    async def measure(server: BareServer) -> dict[str, object]:
        connections = [await RawConnection.open(server.address, METHOD) for _ in range(NUM_CONNECTIONS)]
        load, begin_s, begin_cpu_s = Load(connections), time.monotonic(), server.cpu_s()
        times_ms = await load.requests(NUM_CALLERS, lambda: time.monotonic() < begin_s + seconds)
        calls_s, calls_cpu_s = time.monotonic() - begin_s, server.cpu_s() - begin_cpu_s
        calls = [load.begin(10_000, lambda _: None)[1] for _ in range(NUM_STREAMS)]
        await asyncio.sleep(2)
        begin, begin_s, begin_cpu_s = sum(len(call.messages) for call in calls), time.monotonic(), server.cpu_s()
        await asyncio.sleep(seconds)
        num_messages, spent_s = sum(len(call.messages) for call in calls) - begin, time.monotonic() - begin_s
        for connection in connections:
            connection.close()
        return {
            "calls_per_s": round(len(times_ms) / calls_s),
            "server_cpu_us_per_call": round(calls_cpu_s / len(times_ms) * 1e6, 1),
            "messages_per_s": round(num_messages / spent_s),
            "server_cpu_us_per_message": round((server.cpu_s() - begin_cpu_s) / num_messages * 1e6, 1),
        }

    with BareServer() as server:
        result = asyncio.run(measure(server))
    return {"part": "bound", **result, "load_average": round(os.getloadavg()[0], 1), "cores": os.cpu_count()}


def run_gateways(path: str, *, seconds: float) -> Iterator[dict[str, Any]]:
    """Requests and tokens with the doors in the controller's process, in one gateway, in two; then what the split gains.

    `with_a_core_each` is what the process with the most work for each request (or token) could do alone on a core.
    """
    for part, unit in (("requests", "request"), ("tokens", "token")):
        rates: list[tuple[float, float]] = []
        for num_gateways in range(3):
            row = run(
                part,
                path,
                seconds=seconds,
                num_requests=0,
                num_gateways=num_gateways,
                tokens_per_s=GATEWAY_TOKENS_PER_S if part == "tokens" else None,
            )
            own_us, gateways_us = row[f"controller_cpu_us_per_{unit}"], row[f"gateways_cpu_us_per_{unit}"]
            row["with_a_core_each"] = round(1e6 / max(own_us, gateways_us / max(num_gateways, 1)))
            rates.append((row.get("requests_per_s") or row["delivered_tokens_per_s"], row["with_a_core_each"]))
            yield row
        (rate, alone), *others = rates
        yield {
            "part": "gateways",
            "of": f"{unit}s per second",
            "here": [round(other / rate, 2) for other, _ in others],
            "with_a_core_each": [round(other / alone, 2) for _, other in others],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer turns tokens to text")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long each rate is measured")
    parser.add_argument("--requests", type=int, default=100_000, help="over which memory is watched")
    parser.add_argument("--tokens-per-s", type=float, help="made instead of what is asked for, where others use the machine")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    path = str(resolve(args.model).path)
    has_met_all = True
    for part in args.parts:
        if part == "bound":
            print(json.dumps(run_bound(seconds=args.seconds)), flush=True)
            continue
        if part == "gateways":
            for row in run_gateways(path, seconds=args.seconds):
                print(json.dumps(row), flush=True)
            continue
        result = run(part, path, seconds=args.seconds, num_requests=args.requests, tokens_per_s=args.tokens_per_s)
        has_met_all &= bool(result.get("met", True))
        print(json.dumps(result), flush=True)
    sys.exit(not has_met_all)


if __name__ == "__main__":
    main()
