"""What one controller process can carry: requests admitted and routed, tokens delivered to streams, the delay it adds, memory.

    python benchmarks/bench_controller.py [--seconds 20] [--requests 100000] [--model smollm2-135m] [--parts requests ...]

Replicas compute nothing (timed_runner.py) and live in one process, the controller in another, the clients in this one; all
over real gRPC, between controller and replicas encrypted. The three share the machine's cores: figures are lower bounds, and
the controller's CPU time for each request or token says what it could do with a core to itself. Tokens are counted at the
client; the delay of one is from the step that made it to the client's reading of its message, on one machine's clock.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any

import grpc
from pilotfish.models.store import resolve
from pilotfish.proto import common_pb2, inference_pb2_grpc
from pilotfish.proto import inference_pb2 as pb
from pilotfish.workers.timed_runner import VOCAB_SIZE, TimingModel
from timed_fleet import FleetSettings, TimedFleet

NUM_STREAMS = 500
NUM_CALLERS = 128
TARGET_TOKENS_PER_S = 20_000
PROMPT_TOKENS = 64
GATEWAY_TOKENS_PER_S = 3_000  # so few that each token is a message, also where all processes share two cores
PARTS = ("requests", "tokens", "latency", "memory", "gateways")


def steady(tokens_per_s: float) -> TimingModel:
    """Steps of one length, in which NUM_STREAMS sequences make `tokens_per_s` in all."""
    step_ms = NUM_STREAMS / tokens_per_s * 1e3
    return TimingModel(decode_ms=((1, step_ms), (2, step_ms)), prefill_ms_per_token=0.0)


class Load:
    """The clients: requests with random prompts, in turns over a few channels."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._rng = random.Random(0)
        self._numbers = itertools.count()
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [
            grpc.aio.insecure_channel(address, options=options) for _, address in zip(range(4), itertools.cycle(addresses))
        ]
        self._stubs = itertools.cycle([inference_pb2_grpc.InferenceStub(channel) for channel in self._channels])

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def stream(self, max_tokens: int) -> AsyncIterator[tuple[str, pb.TextDelta]]:
        """A request's id with each of its deltas."""
        request_id = f"r{next(self._numbers)}"
        call = next(self._stubs).Generate(
            pb.GenerateRequest(
                request_id=request_id,
                tokens=pb.TokenIds(ids=self._rng.choices(range(VOCAB_SIZE), k=PROMPT_TOKENS)),
                sampling=common_pb2.SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
            ),
            timeout=600,
        )
        async for event in call:
            if event.HasField("delta"):
                yield request_id, event.delta

    async def request(self) -> None:
        """One that ends with its first token."""
        num_tokens = 0
        async for _, delta in self.stream(1):
            num_tokens += len(delta.token_ids)
        assert num_tokens == 1


async def bench_requests(fleet: TimedFleet, load: Load, *, seconds: float) -> dict[str, object]:
    """Callers that ask again as soon as they have their one token."""
    times_ms: list[float] = []

    async def call(until_s: float) -> None:
        while (asked_s := time.monotonic()) < until_s:
            await load.request()
            times_ms.append((time.monotonic() - asked_s) * 1e3)

    await asyncio.gather(*(load.request() for _ in range(NUM_CALLERS)))
    cpu_s, gateways_s, start_s = fleet.controller_cpu_s(), fleet.gateways_cpu_s(), time.monotonic()
    await asyncio.gather(*(call(start_s + seconds) for _ in range(NUM_CALLERS)))
    return {
        "callers": NUM_CALLERS,
        "requests_per_s": round(len(times_ms) / (time.monotonic() - start_s)),
        "asked_for": 1500,
        "controller_cpu_us_per_request": round((fleet.controller_cpu_s() - cpu_s) / len(times_ms) * 1e6),
        "gateways_cpu_us_per_request": round((fleet.gateways_cpu_s() - gateways_s) / len(times_ms) * 1e6),
        **percentiles("total_ms", times_ms),
    }


async def bench_tokens(fleet: TimedFleet, load: Load, *, seconds: float, offered_per_s: float) -> dict[str, object]:
    """NUM_STREAMS long streams; counts what arrives after all have begun, and how late it is."""
    arrivals: list[tuple[str, int, float]] = []
    num_messages = num_begun = 0
    all_begun = asyncio.Event()

    async def read() -> None:
        nonlocal num_messages, num_begun
        has_begun = False
        async for request_id, delta in load.stream(10_000):
            if not has_begun:
                has_begun = True
                num_begun += 1
                if num_begun == NUM_STREAMS:
                    all_begun.set()
            now_s = time.monotonic()
            num_messages += 1
            arrivals.extend((request_id, delta.offset + index, now_s) for index in range(len(delta.token_ids)))

    fleet.emissions()
    tasks = [asyncio.create_task(read()) for _ in range(NUM_STREAMS)]
    async with asyncio.timeout(120):
        await all_begun.wait()
    await asyncio.sleep(2)
    arrivals.clear()
    gateways_s, num_messages, cpu_s, start_s = fleet.gateways_cpu_s(), 0, fleet.controller_cpu_s(), time.monotonic()
    await asyncio.sleep(seconds)
    spent_s, cpu_s, gateways_s, counted, messages = (
        time.monotonic() - start_s,
        fleet.controller_cpu_s() - cpu_s,
        fleet.gateways_cpu_s() - gateways_s,
        list(arrivals),
        num_messages,
    )
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    emitted_s = await asyncio.to_thread(fleet.emissions)
    delays_ms = [(now_s - emitted_s[request_id, offset]) * 1e3 for request_id, offset, now_s in counted]
    made = sum(start_s <= at_s < start_s + spent_s for at_s in emitted_s.values())
    return {
        "streams": NUM_STREAMS,
        "offered_tokens_per_s": offered_per_s,
        "made_tokens_per_s": round(made / spent_s),
        "delivered_tokens_per_s": round(len(counted) / spent_s),
        "tokens_per_message": round(len(counted) / max(messages, 1), 2),
        "controller_cores": round(cpu_s / spent_s, 2),
        "controller_cpu_us_per_token": round(cpu_s / max(len(counted), 1) * 1e6, 1),
        "gateways_cpu_us_per_token": round(gateways_s / max(len(counted), 1) * 1e6, 1),
        **percentiles("added_ms", delays_ms),
    }


async def bench_memory(fleet: TimedFleet, load: Load, *, num_requests: int) -> dict[str, object]:
    """The controller's memory over many requests, ten readings."""
    readings: list[float] = []
    start_s = time.monotonic()
    for _ in range(10):
        left = itertools.repeat(None, num_requests // 10)

        async def call(left: Iterable[None] = left) -> None:
            for _ in left:  # shared by all callers
                await load.request()

        await asyncio.gather(*(call() for _ in range(NUM_CALLERS)))
        readings.append(round(fleet.controller_rss_mib(), 1))
    return {"requests": num_requests, "rss_mib": readings, "seconds": round(time.monotonic() - start_s)}


def percentiles(name: str, values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"{name}_p{p}": round(ordered[min(len(ordered) * p // 100, len(ordered) - 1)], 1) for p in (50, 99) if ordered}


def run(
    part: str, path: str, *, seconds: float, num_requests: int, num_gateways: int = 0, tokens_per_s: float | None = None
) -> dict[str, Any]:
    """One part with a fleet of its own."""
    offered = tokens_per_s or {"tokens": 1.5 * TARGET_TOKENS_PER_S, "latency": 0.5 * TARGET_TOKENS_PER_S}.get(part, 100_000.0)

    async def measure(fleet: TimedFleet) -> dict[str, object]:
        load = Load(fleet.addresses)
        try:
            if part == "requests":
                return await bench_requests(fleet, load, seconds=seconds)
            if part == "memory":
                return await bench_memory(fleet, load, num_requests=num_requests)
            return await bench_tokens(fleet, load, seconds=seconds, offered_per_s=offered)
        finally:
            await load.close()

    num_kv_blocks = 2048 if part == "memory" else 100_000  # full soon: the router's index grows with the caches until then
    settings = FleetSettings(path=path, timing=steady(offered), num_kv_blocks=num_kv_blocks, num_gateways=num_gateways)
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
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    path = str(resolve(args.model).path)
    for part in args.parts:
        if part == "gateways":
            for row in run_gateways(path, seconds=args.seconds):
                print(json.dumps(row), flush=True)
            continue
        print(json.dumps(run(part, path, seconds=args.seconds, num_requests=args.requests)), flush=True)


if __name__ == "__main__":
    main()
