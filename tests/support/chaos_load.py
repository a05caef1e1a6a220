"""The streams that a chaos test reads, and what each of them said when nothing disturbed it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest
from pilotfish.client import AsyncClient, Completion, RetryPolicy
from pilotfish.common.errors import PilotfishError

# A request that no server has taken yet is tried for as long as one that has been: it is a stream here too.
_RETRY = RetryPolicy(max_attempts=1000, initial_backoff_s=0.02, max_backoff_s=0.25, reconnect_timeout_s=60)
_STOP_CHARS = 9


@dataclass(frozen=True, kw_only=True)
class Request:
    prompt: Sequence[int] | str
    options: Mapping[str, Any]
    wants_stop: bool = False  # a stop string from the middle of its answer


def make_requests(prompts: Sequence[Sequence[int] | str], *, seed: int, max_tokens: tuple[int, int]) -> list[Request]:
    """One for each prompt: greedy and seeded sampling, with and without all that could go wrong at a break."""
    dice = random.Random(seed)
    requests = []
    for number, prompt in enumerate(prompts):
        options: dict[str, Any] = {
            "temperature": 0.0,
            "seed": number,
            "max_tokens": dice.randint(*max_tokens),
            "ignore_eos": True,
        }
        if number % 2:
            options |= {"temperature": 0.9, "top_p": 0.95}
        if number % 8 in (1, 4):
            options |= {"presence_penalty": 0.6, "frequency_penalty": 0.4, "repetition_penalty": 1.1}
        if number % 8 in (2, 5):
            options |= {"logprobs": 2}
        if number % 8 in (3, 5, 6):
            options |= {"n": 2}
        requests.append(Request(prompt=prompt, options=options, wants_stop=number % 8 in (5, 6, 7)))
    return requests


@dataclass
class Tally:
    """What became of the streams. `wrong` says of each that was not as it should be what differed."""

    num_streams: int = 0
    num_tokens: int = 0
    num_lost: int = 0
    num_repeated: int = 0
    num_hung: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not (self.num_lost or self.num_repeated or self.num_hung or self.wrong)

    def __add__(self, other: Tally) -> Tally:
        return Tally(**{entry.name: getattr(self, entry.name) + getattr(other, entry.name) for entry in fields(self)})

    def __str__(self) -> str:
        return (
            f"{self.num_streams} streams, {self.num_tokens} tokens: {self.num_lost} lost, {self.num_repeated} repeated, "
            f"{self.num_hung} hung"
        )


class Load:
    """As many streams at a time as there are requests, over a client for each address. `num_received` counts their tokens."""

    def __init__(self, addresses: Sequence[str], requests: Sequence[Request]) -> None:
        self._clients = [AsyncClient(address, retry=_RETRY, timeout_s=1800) for address in addresses]
        self._requests = list(requests)
        self._expected: list[Completion] = []
        self.num_received = 0

    async def __aenter__(self) -> Load:
        return self

    async def __aexit__(self, *error: object) -> None:
        for client in self._clients:
            await client.aclose()

    async def learn(self) -> None:
        """Read every answer once; nothing must disturb it."""
        plain = await self._read_all(range(len(self._requests)))
        for number, completion in plain.items():
            request = self._requests[number]
            if request.wants_stop:
                middle = len(completion.text) * 2 // 3
                stop = completion.text[middle : middle + _STOP_CHARS]
                self._requests[number] = replace(request, options={**request.options, "stop": [stop]})
        again = [number for number, request in enumerate(self._requests) if request.wants_stop]
        known = plain | await self._read_all(again)
        self._expected = [known[number] for number in range(len(self._requests))]

    async def read(self, until: asyncio.Event, *, limit_s: float) -> Tally:
        """Read every answer again and again; those under way when `until` is set have `limit_s` to end."""
        tally = Tally()
        tasks = [asyncio.create_task(self._repeat(number, until, tally)) for number in range(len(self._requests))]
        await until.wait()
        done, hung = await asyncio.wait(tasks, timeout=limit_s)
        tally.num_hung = len(hung)
        for task in hung:
            task.cancel()
        await asyncio.gather(*hung, return_exceptions=True)
        for task in done:
            task.result()
        return tally

    async def _repeat(self, number: int, until: asyncio.Event, tally: Tally) -> None:
        while not until.is_set():
            tally.num_streams += 1
            try:
                completion = await self._read_one(number)
            except (PilotfishError, AssertionError) as error:
                tally.num_lost += sum(len(choice.token_ids) for choice in self._expected[number].choices)
                tally.wrong.append(f"stream {number} {dict(self._requests[number].options)}: {type(error).__name__}: {error}")
            else:
                self._compare(number, completion, tally)

    async def _read_all(self, numbers: Sequence[int]) -> dict[int, Completion]:
        return dict(zip(numbers, await asyncio.gather(*map(self._read_one, numbers)), strict=True))

    async def _read_one(self, number: int) -> Completion:
        """The answer as its user reads it, delta by delta."""
        request = self._requests[number]
        stream = self._clients[number % len(self._clients)].stream_generate(request.prompt, **request.options)
        texts: dict[int, str] = {}
        tokens: dict[int, list[int]] = {}
        async for delta in stream:
            texts[delta.index] = texts.get(delta.index, "") + delta.text
            tokens.setdefault(delta.index, []).extend(delta.token_ids)
            self.num_received += len(delta.token_ids)
        for choice in stream.completion.choices:
            assert texts[choice.index] == choice.text
            assert tokens[choice.index] == list(choice.token_ids)
        return stream.completion

    def _compare(self, number: int, completion: Completion, tally: Tally) -> None:
        expected = self._expected[number]
        differences = []
        for mine, theirs in zip(completion.choices, expected.choices, strict=True):
            tally.num_tokens += len(mine.token_ids)
            if mine.token_ids != theirs.token_ids:
                position = next(
                    (i for i, pair in enumerate(zip(mine.token_ids, theirs.token_ids, strict=False)) if pair[0] != pair[1]),
                    min(len(mine.token_ids), len(theirs.token_ids)),
                )
                tally.num_lost += max(0, len(theirs.token_ids) - len(mine.token_ids))
                tally.num_repeated += max(0, len(mine.token_ids) - len(theirs.token_ids))
                differences.append(f"choice {mine.index} differs at token {position} of {len(theirs.token_ids)}")
            for name in ("text", "finish_reason", "stop_reason"):
                if getattr(mine, name) != getattr(theirs, name):
                    differences.append(f"{name} is {getattr(mine, name)!r} instead of {getattr(theirs, name)!r}")
            if [_whole(entry) for entry in mine.logprobs] != [_near(entry) for entry in theirs.logprobs]:
                differences.append(f"{len(mine.logprobs)} log probabilities differ from {len(theirs.logprobs)}")
        for name in ("prompt_tokens", "completion_tokens"):
            if getattr(completion.usage, name) != getattr(expected.usage, name):
                differences.append(f"usage's {name} {getattr(completion.usage, name)} is not {getattr(expected.usage, name)}")
        if differences:
            tally.wrong.append(f"stream {number} {dict(self._requests[number].options)}: {'; '.join(differences)}")


def _whole(entry: Any) -> tuple[Any, ...]:
    return entry.token_id, entry.rank, entry.logprob, [(top.token_id, top.logprob) for top in entry.top]


def _near(entry: Any) -> tuple[Any, ...]:
    """A prefill rounds otherwise than a decode step does."""
    top = [(top.token_id, pytest.approx(top.logprob, abs=1e-3)) for top in entry.top]
    return entry.token_id, entry.rank, pytest.approx(entry.logprob, abs=1e-3), top
