"""From the leader's `send` to the plan that a rank has received and decoded, between processes of one machine.

Run `python benchmarks/bench_plan_channel.py`; it needs neither a model nor a GPU. The leader sends the plan of a step that
decodes, as often as a step would, and stamps it with a clock that all processes share; each rank subtracts. Encoding is timed
apart, since the leader may do it while the step before runs. One JSON row for each way (`ring`: the shared memory of one node,
`stream`: gRPC with TLS, which ranks on other nodes have, here over the loopback) and number of processes. A process that finds
no free core waits for one: the figures count on a machine with as many idle cores as processes.

A plan is sent when the step before it begins, so a rank waits when its own step could begin and the plan is not there:
`wait_share` is the part of the time that the rank which waits most does so.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
import uuid
from collections.abc import Callable
from functools import partial
from itertools import product
from multiprocessing.connection import Connection

from pilotfish.common.identity import Identity
from pilotfish.common.requests import EngineRequest, TokenSampling
from pilotfish.controller.authority import Authority
from pilotfish.scheduler.step_plan import AdmittedSequence, PlannedRow, StepPlan
from pilotfish.workers.plan_channel import Reader, Writer
from pilotfish.workers.plan_codec import PlanDecoder, encode_plan
from pilotfish.workers.plan_stream import PlanFollower, PlanServer

EPOCH = 1
BLOCK_SIZE = 16
STAMP_BYTES = 8
PATIENCE_S = 60.0
NUM_WARM_UP = 50


def first_plan(num_sequences: int) -> StepPlan:
    sampling = TokenSampling(temperature=0.0, max_tokens=1000, seed=0)
    prompt = tuple(range(100))
    admitted = [
        AdmittedSequence(
            EngineRequest(request_id=f"request-{slot}", prompt_token_ids=prompt, sampling=sampling), slot, prompt, (), 0, 0
        )
        for slot in range(num_sequences)
    ]
    return StepPlan(1, tuple(admitted), (), ())


def decode_plan(num_sequences: int, step_id: int) -> StepPlan:
    """Every sequence decodes; one in BLOCK_SIZE gets a block."""
    rows = [
        PlannedRow(
            f"request-{slot}", slot, 98 + step_id, 1, True, (slot,) if (slot + step_id) % BLOCK_SIZE == 0 else (), step_id - 2
        )
        for slot in range(num_sequences)
    ]
    return StepPlan(step_id, (), tuple(rows), ())


def open_ring(name: str, index: int) -> Reader | PlanFollower:
    return Reader(name, epoch=EPOCH, index=index, timeout_s=PATIENCE_S)


def open_stream(address: str, leader: str, rank: str, identity: Identity) -> Reader | PlanFollower:
    return PlanFollower(address, epoch=EPOCH, follower=rank, leader=leader, identity=identity, timeout_s=PATIENCE_S)


def follow(pipe: Connection, open_end: Callable[[], Reader | PlanFollower], num_steps: int, step_ns: float) -> None:
    reader = open_end()
    decoder = PlanDecoder(epoch=EPOCH)
    received_us, decoded_us = [], []
    waited_ns = waited_until_ns = 0.0
    cpu_s = time.process_time()
    for number in range(num_steps):
        message = reader.receive(PATIENCE_S)
        received_ns = time.monotonic_ns()
        assert message is not None
        decoder.decode(memoryview(message)[STAMP_BYTES:])
        decoded_ns = time.monotonic_ns()
        sent_ns = int.from_bytes(message[:STAMP_BYTES], "little")
        received_us.append((received_ns - sent_ns) / 1e3)
        decoded_us.append((decoded_ns - sent_ns) / 1e3)
        begin_ns = max(sent_ns + step_ns, waited_until_ns)
        if number >= NUM_WARM_UP and decoded_ns > begin_ns:
            waited_ns, waited_until_ns = waited_ns + decoded_ns - begin_ns, decoded_ns
    pipe.send((received_us, decoded_us, time.process_time() - cpu_s, waited_ns * 1e-9))
    reader.close()


def open_writer(
    way: str, names: list[str]
) -> tuple[Writer | PlanServer, Callable[[], None], list[Callable[[], Reader | PlanFollower]]]:
    """The leader's end, what waits for all ranks, and what opens the end of each."""
    if way == "ring":
        name = f"pilotfish-bench-{uuid.uuid4().hex}-epoch-{EPOCH}"
        ring = Writer(name, epoch=EPOCH, readers=names)
        ends = [partial(open_ring, name, index) for index in range(len(names))]
        return ring, partial(ring.wait_for_readers, PATIENCE_S), ends
    authority, leader = Authority.create(), "leader"
    server = PlanServer(epoch=EPOCH, followers=names, identity=authority.issue(leader))
    address = server.start(host="127.0.0.1")
    ends = [partial(open_stream, address, leader, name, authority.issue(name)) for name in names]
    return server, partial(server.wait_for_followers, PATIENCE_S), ends


def measure(way: str, num_readers: int, args: argparse.Namespace) -> dict[str, object]:
    context = multiprocessing.get_context("spawn")
    writer, wait_for_ranks, ends = open_writer(way, [f"rank {index + 1}" for index in range(num_readers)])
    pipes, ranks = [], []
    try:
        for end in ends:
            ours, theirs = context.Pipe()
            rank = context.Process(target=follow, args=(theirs, end, args.steps, args.step_ms * 1e6), daemon=True)
            rank.start()
            pipes.append(ours)
            ranks.append(rank)
        wait_for_ranks()
        encode_us, num_bytes, start_s = [], 0, time.monotonic()
        for step_id in range(1, args.steps + 1):
            plan = first_plan(args.sequences) if step_id == 1 else decode_plan(args.sequences, step_id)
            encode_start_ns = time.monotonic_ns()
            message = encode_plan(plan, epoch=EPOCH)
            encode_us.append((time.monotonic_ns() - encode_start_ns) / 1e3)
            num_bytes = len(message)
            time.sleep(max(0.0, start_s + step_id * args.step_ms * 1e-3 - time.monotonic()))
            writer.send(time.monotonic_ns().to_bytes(STAMP_BYTES, "little") + message, PATIENCE_S)
        results = [pipe.recv() if pipe.poll(PATIENCE_S) else None for pipe in pipes]
        wall_s = time.monotonic() - start_s
    finally:
        writer.close()
        for rank in ranks:
            rank.join(1.0)
            rank.kill()
    received_us = [value for result in results for value in result[0][NUM_WARM_UP:]]
    decoded_us = [value for result in results for value in result[1][NUM_WARM_UP:]]
    return {
        "way": way,
        "processes": 1 + num_readers,
        "sequences": args.sequences,
        "step_ms": args.step_ms,
        "message_bytes": num_bytes,
        "encode_p50_us": round(statistics.median(encode_us), 1),
        "received_p50_us": quantile(received_us, 0.5),
        "received_p99_us": quantile(received_us, 0.99),
        "decoded_p50_us": quantile(decoded_us, 0.5),
        "decoded_p99_us": quantile(decoded_us, 0.99),
        "wait_share": round(max(result[3] for result in results) / wall_s, 5),
        "reader_cpu_share": round(max(result[2] for result in results) / wall_s, 3),
    }


def quantile(values: list[float], share: float) -> float:
    return round(sorted(values)[int(len(values) * share)], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--step-ms", type=float, default=5.0)
    args = parser.parse_args()
    machine = {"machine": platform.machine(), "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
    for way, num_readers in product(("ring", "stream"), (1, 3)):
        print(json.dumps(measure(way, num_readers, args) | machine), flush=True)


if __name__ == "__main__":
    main()
