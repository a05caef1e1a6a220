"""Readers of streams in turn: a few a round, in the order in which they were woken."""

import asyncio

from pilotfish.controller.outlet import Outlet


async def test_others_have_their_turn_between_a_few_readers() -> None:
    outlet = Outlet()
    readers, woken = [outlet.turn() for _ in range(100)], list[int]()
    for reader in readers:
        reader.clear()

    async def wait(number: int) -> None:
        await readers[number].wait()
        woken.append(number)

    tasks = [asyncio.create_task(wait(number)) for number in range(len(readers))]
    await asyncio.sleep(0)
    for reader in (*readers, *readers[:10]):  # some are woken again before their turn, and keep their place
        reader.set()
    counts = []
    async with asyncio.timeout(60):
        while len(woken) < len(readers):
            before = len(woken)
            await asyncio.sleep(0)
            counts.append(len(woken) - before)
    assert woken == list(range(len(readers)))
    assert max(counts) <= 32
    await asyncio.gather(*tasks)


async def test_who_is_woken_after_its_turn_has_another() -> None:
    reader = Outlet().turn()
    reader.clear()
    async with asyncio.timeout(60):
        for _ in range(3):
            reader.set()
            await reader.wait()
            reader.clear()


class RecordedSender:
    def __init__(self, number: int, log: list[tuple[str, int]]) -> None:
        self._number = number
        self._log = log

    def prepare(self) -> bool:
        self._log.append(("prepare", self._number))
        return self._number != 1

    def send(self) -> None:
        self._log.append(("send", self._number))

    def settle(self) -> None:
        self._log.append(("settle", self._number))


async def test_senders_of_a_round_prepare_then_send_and_settle_two_rounds_later() -> None:
    outlet, log = Outlet(), list[tuple[str, int]]()
    turns = [outlet.turn() for _ in range(70)]
    for number, turn in enumerate(turns):
        turn.sender = RecordedSender(number, log)
        turn.set()
    rounds = []
    for _ in range(3):
        log.clear()
        await asyncio.sleep(0)
        rounds.append(list(log))
    first, second, third = (
        [number for number in numbers if number != 1] for numbers in (range(32), range(32, 64), range(64, 70))
    )
    assert rounds == [
        [*(("prepare", number) for number in range(32)), *(("send", number) for number in first)],
        [*(("prepare", number) for number in second), *(("send", number) for number in second)],
        [
            *(("settle", number) for number in first),
            *(("prepare", number) for number in third),
            *(("send", number) for number in third),
        ],
    ]
