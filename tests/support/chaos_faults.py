"""What is done to a cluster, and when: a schedule that follows from its seed.

Its clock is what clients have received, in tokens: a slow machine has as much to lose between two faults as a fast one.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from chaos_host import ChaosHost, Worker

RESTART = "restart the controller"
# Parts of a hundred.
KINDS: Mapping[str, int] = {
    "kill a worker": 24,
    "stop a worker": 20,
    "cut a link": 16,
    "silence a link": 12,
    RESTART: 8,
    "break a client's connection": 20,
}
_PICK_S = 30.0
_STILL_S = 120.0


@dataclass(frozen=True, slots=True)
class Fault:
    """`at_tokens` counts from the first one on; `target` chooses among those who can suffer it then; `duration_s` is how long a
    stop, a cut or a silence lasts."""

    at_tokens: int
    kind: str
    target: int
    duration_s: float


def schedule(
    seed: int, *, num_faults: int, interval_tokens: int, longest_s: float, parts: Mapping[str, int] = KINDS
) -> list[Fault]:
    """One fault every `interval_tokens` on average; each kind has its part. Half of the durations are up to a quarter of
    `longest_s`."""
    dice = random.Random(seed)
    kinds = [kind for kind, part in parts.items() for _ in range(max(1, round(part * num_faults / 100)))][:num_faults]
    kinds += dice.choices(list(parts), list(parts.values()), k=num_faults - len(kinds))
    dice.shuffle(kinds)
    times = sorted(dice.randrange(num_faults * interval_tokens) for _ in kinds)
    return [
        Fault(when, kind, dice.randrange(10**6), longest_s * dice.choice([dice.uniform(0.02, 0.25), dice.uniform(0.25, 1.0)]))
        for when, kind in zip(times, kinds, strict=True)
    ]


async def inflict(host: ChaosHost, faults: Sequence[Fault], *, num_received: Callable[[], int]) -> Counter[str]:
    """All faults, each at its time whether earlier ones are over or not; returns how many there were of each kind.

    `num_received` is the clock. Raises TimeoutError: it stands still.
    """
    restarts, happened, start = asyncio.Lock(), Counter[str](), num_received()

    async def happen(fault: Fault) -> None:
        if fault.kind == RESTART:
            async with restarts:
                await host.restart_controller()
        elif fault.kind == "break a client's connection":
            host.break_client(fault.target % len(host.doors))
        else:
            await _hurt(await _pick(host, fault.target), fault)
        happened[fault.kind] += 1

    async with asyncio.TaskGroup() as tasks:
        for fault in faults:
            await _until(start + fault.at_tokens, num_received)
            tasks.create_task(happen(fault))
    return happened


async def _until(num_tokens: int, num_received: Callable[[], int]) -> None:
    seen = num_received()
    while seen < num_tokens:
        async with asyncio.timeout(_STILL_S):
            while num_received() == seen:
                await asyncio.sleep(0.01)
        seen = num_received()


async def _pick(host: ChaosHost, target: int) -> Worker:
    """One of the workers that serve, once there is one."""
    async with asyncio.timeout(_PICK_S):
        while not (workers := host.serving):
            await asyncio.sleep(0.02)
    return workers[target % len(workers)]


async def _hurt(worker: Worker, fault: Fault) -> None:
    link, process = worker.link, worker.process
    assert link is not None
    match fault.kind:
        case "kill a worker":
            process.kill()
        case "stop a worker":
            process.stop()
            await asyncio.sleep(fault.duration_s)
            process.resume()
        case "cut a link":
            link.refuses = True
            link.cut()
            await asyncio.sleep(fault.duration_s)
            link.refuses = False
        case "silence a link":
            link.silent = True
            await asyncio.sleep(fault.duration_s)
            link.silent = False
        case _:
            raise AssertionError(fault.kind)
