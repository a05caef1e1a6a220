"""Requests through the whole controller: one replica, real server and scheduler, arithmetic in place of a model."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from fake_engine import expected_tokens
from local_workers import Cluster, StartCluster
from pilotfish.common.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    Unavailable,
)
from pilotfish.common.requests import FinishReason
from pilotfish.controller import worker_link
from pilotfish.controller.events import Delta, Started
from pilotfish.controller.outlet import Turn
from pilotfish.controller.service import RequestHandle
from pilotfish.text.prepare import choice_seed
from reading import Answer, eventually, read, read_until

PROMPT = [5, 6, 7, 8]


async def generate(cluster: Cluster, prompt: str | list[int] | None = None, **options: Any) -> RequestHandle:
    sampling = {"max_tokens": 20, **options.pop("sampling", {})}
    return await cluster.service.start_request(prompt=PROMPT if prompt is None else prompt, sampling=sampling, **options)


def decoded(cluster: Cluster, token_ids: list[int]) -> str:
    return cluster.service._front_end.tokenizer.decode(token_ids)


def used_blocks(cluster: Cluster, worker: int = 0) -> int:
    return cluster.launcher.launched[worker].engine.scheduler.load().num_used_blocks


async def nothing_runs(cluster: Cluster) -> None:
    """The ledger, the router and the engines agree that all is over."""
    dispatcher = cluster.controller._dispatcher
    await eventually(lambda: dispatcher.num_running == 0)
    assert dispatcher.num_queued == 0
    for name in dispatcher._replicas:
        assert dispatcher.router.num_active(name) == 0
        assert dispatcher.router.queued_tokens(name) == 0
    await eventually(lambda: all(used_blocks(cluster, i) == 0 for i in range(len(cluster.launcher.launched))))
    assert cluster.controller._intake.streams.in_flight() == []


async def test_a_request_answers_with_started_deltas_and_usage(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    handle = await generate(cluster, request_id="mine")
    answer = await read(handle)
    expected = expected_tokens(PROMPT, 20)
    assert answer.started is not None
    assert (answer.started.request_id, answer.started.model, answer.started.prompt_tokens) == ("mine", "tiny", 4)
    assert answer.choices[0].token_ids == expected
    assert answer.choices[0].text == decoded(cluster, expected)
    assert answer.choices[0].finish_reason is FinishReason.LENGTH
    usage = answer.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.replica) == (4, 20, 0, "replica-0")
    assert 0 <= usage.queue_ms <= usage.ttft_ms <= usage.total_ms
    await nothing_runs(cluster)
    assert handle._stream._timer.cancelled()


async def test_a_repeated_prompt_is_found_in_the_cache(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    prompt = list(range(70))
    first, again = [await read(await generate(cluster, prompt)) for _ in range(2)]
    assert first.choices[0].token_ids == again.choices[0].token_ids
    assert (first.usage.cached_tokens, again.usage.cached_tokens) == (0, 64)


async def test_many_requests_at_once(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(max_num_seqs=4, num_blocks=64)
    prompts = [[i, i + 1, 3] for i in range(40)]
    answers = await asyncio.gather(*(_ask(cluster, prompt) for prompt in prompts))
    assert [a.choices[0].token_ids for a in answers] == [expected_tokens(prompt, 20) for prompt in prompts]
    await nothing_runs(cluster)


async def _ask(cluster: Cluster, prompt: list[int], **options: Any) -> Answer:
    return await read(await generate(cluster, prompt, **options))


async def test_choices_are_told_apart(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    answer = await read(await generate(cluster, sampling={"n": 3}))
    assert {i: c.token_ids for i, c in answer.choices.items()} == dict.fromkeys(range(3), expected_tokens(PROMPT, 20))
    assert answer.usage.completion_tokens == 60
    assert answer.usage.prompt_tokens == 4
    assert len({request.sampling.seed for request in cluster.launcher.launched[0].engine.submitted}) == 3
    await nothing_runs(cluster)


async def test_a_stop_string_across_chunks_ends_the_text_and_the_worker(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.002)
    text = decoded(cluster, expected_tokens(PROMPT, 30))
    stop = text[9:14]  # one token is one character: it spans five steps
    at = text.index(stop)
    answer = await read(await generate(cluster, sampling={"max_tokens": 3000, "stop": ["nowhere to be found", stop]}))
    choice = answer.choices[0]
    assert choice.text == text[:at]
    assert (choice.finish_reason, choice.stop_reason) == (FinishReason.STOP, stop)
    assert answer.usage.completion_tokens == at + len(stop)
    await nothing_runs(cluster)
    assert len(cluster.launcher.launched[0].engine.aborted) == 1


async def test_one_choice_stops_while_the_other_goes_on(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.002, uses_seeds=True)
    engine = cluster.launcher.launched[0].engine
    first = decoded(cluster, expected_tokens(PROMPT, 30, seed=choice_seed(7, 0)))
    second = decoded(cluster, expected_tokens(PROMPT, 300, seed=choice_seed(7, 1)))
    stop = first[9:14]
    assert stop not in second
    handle = await generate(cluster, sampling={"n": 2, "max_tokens": 300, "stop": stop, "seed": 7})
    answer = Answer()
    await read_until(handle, answer, lambda a: 0 in a.choices and a.choices[0].finish_reason is FinishReason.STOP)
    await eventually(lambda: len(engine.aborted) == 1)
    assert answer.choices[1].finish_reason is None
    await read(handle, into=answer)
    assert (answer.choices[0].text, answer.choices[1].text) == (first[: first.index(stop)], second)
    await nothing_runs(cluster)


@pytest.mark.parametrize("leave", ["cancel", "exit", "task", "aclose"])
async def test_a_reader_that_leaves_frees_the_blocks_within_two_steps(start_cluster: StartCluster, leave: str) -> None:
    cluster = await start_cluster(step_s=0.01)
    engine = cluster.launcher.launched[0].engine
    handle = await generate(cluster, list(range(40)), sampling={"max_tokens": 4000})
    answer = Answer()
    await read_until(handle, answer, lambda a: a.num_deltas >= 3)
    assert used_blocks(cluster) > 0
    if leave == "cancel":
        handle.cancel()
        handle.cancel()
    elif leave == "exit":
        async with handle:
            pass
    elif leave == "aclose":
        await handle.aclose()
    else:
        task = asyncio.create_task(read_until(handle, answer, lambda a: False))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await eventually(lambda: len(engine.aborted) == 1)
    aborted_at = engine.health().step_id
    await eventually(lambda: used_blocks(cluster) == 0)
    assert engine.health().step_id <= aborted_at + 2
    await nothing_runs(cluster)


async def test_cancelling_tells_the_worker_within_one_turn_of_the_loop(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.01)
    handle = await generate(cluster, sampling={"max_tokens": 4000})
    await read_until(handle, Answer(), lambda a: a.num_deltas >= 2)
    link = cluster.controller._fleet._replicas[0].places[0].link
    handle.cancel()
    assert [len(message.aborts) for message in link._outgoing] == [1]


async def test_what_a_worker_is_told_at_once_goes_in_one_message(
    start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = await start_cluster(step_s=0.01)
    link = cluster.controller._fleet._replicas[0].places[0].link
    handles = [await generate(cluster, sampling={"max_tokens": 3}) for _ in range(4)]
    assert [len(message.submits) for message in link._outgoing] == [4]
    for handle in handles:
        await read(handle)
    monkeypatch.setattr(worker_link, "_MAX_JOINED_TOKENS", 2 * len(PROMPT))
    handles = [await generate(cluster, sampling={"max_tokens": 3}) for _ in range(5)]
    assert [len(message.submits) for message in link._outgoing] == [2, 2, 1]
    for handle in handles:
        await read(handle)


async def test_abort_by_id(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.005)
    handle = await generate(cluster, request_id="mine", sampling={"max_tokens": 4000})
    answer = Answer()
    await read_until(handle, answer, lambda a: a.num_deltas >= 2)
    assert await cluster.service.abort("another") is False
    assert await cluster.service.abort("mine") is True
    with pytest.raises(Cancelled, match="mine was aborted"):
        await read(handle, into=answer)
    assert await cluster.service.abort("mine") is False
    await nothing_runs(cluster)


async def test_a_deadline_ends_a_running_request_and_tells_what_there_was(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.01)
    answer = Answer()
    with pytest.raises(DeadlineExceeded, match=r"not complete after its 0\.3 s \(\d+ tokens"):
        await read(await generate(cluster, timeout_s=0.3, sampling={"max_tokens": 4000}), into=answer)
    tokens = answer.choices[0].token_ids
    assert tokens == expected_tokens(PROMPT, len(tokens))
    await nothing_runs(cluster)


async def test_a_deadline_ends_a_request_whose_worker_hangs(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    engine = cluster.launcher.launched[0].engine
    engine.gate.clear()
    with pytest.raises(DeadlineExceeded):
        await read(await generate(cluster, timeout_s=0.2))
    assert 0 < engine.submitted[0].deadline_ms <= 200
    engine.gate.set()
    await nothing_runs(cluster)


async def test_a_full_queue_refuses_at_once_and_a_deadline_empties_it(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(max_num_seqs=2, gateway={"max_queued_requests": 2})
    cluster.launcher.launched[0].engine.gate.clear()
    on_worker = [await generate(cluster) for _ in range(3)]  # two places and one ahead
    queued = [await generate(cluster, timeout_s=0.2) for _ in range(2)]
    with pytest.raises(Overloaded) as refused:
        await generate(cluster, request_id="refused")
    assert refused.value.retry_after_s > 0
    assert cluster.controller._intake.streams.get("refused") is None
    status = cluster.service.status()
    assert (status.num_running, status.num_queued) == (3, 2)
    for handle in queued:
        with pytest.raises(DeadlineExceeded):
            await read(handle)
    assert cluster.service.status().num_queued == 0
    late = await generate(cluster)
    cluster.launcher.launched[0].engine.gate.set()
    for handle in [*on_worker, late]:
        assert (await read(handle)).choices[0].token_ids == expected_tokens(PROMPT, 20)
    await nothing_runs(cluster)


async def test_choices_are_let_in_together(start_cluster: StartCluster) -> None:
    """Else a request for many would come back in vain for as long as the queue is full."""
    cluster = await start_cluster(max_num_seqs=2, gateway={"max_queued_requests": 2})
    cluster.launcher.launched[0].engine.gate.clear()
    for _ in range(3 + 1):  # two places, one ahead, and half of the queue
        await generate(cluster)
    handle = await generate(cluster, sampling={"n": 6})
    assert cluster.service.status().num_queued == 1 + 6
    with pytest.raises(Overloaded):
        await generate(cluster, sampling={"n": 6})
    assert cluster.service.status().num_queued == 1 + 6
    cluster.launcher.launched[0].engine.gate.set()
    assert len((await read(handle)).choices) == 6
    await nothing_runs(cluster)


async def test_a_higher_priority_leaves_the_queue_first(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(max_num_seqs=1, step_s=0.001)
    engine = cluster.launcher.launched[0].engine
    engine.gate.clear()
    busy = [await generate(cluster) for _ in range(2)]
    low, high = await generate(cluster, request_id="low"), await generate(cluster, request_id="high", priority=5)
    engine.gate.set()
    await asyncio.gather(*(read(handle) for handle in [*busy, low, high]))
    assert [request.request_id.partition("~")[0] for request in engine.submitted][2:] == ["high", "low"]


async def test_a_slow_reader_gets_one_large_delta_and_holds_up_nobody(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    slow = await generate(cluster, sampling={"n": 2, "max_tokens": 300})
    assert isinstance(await anext(slow), Started)
    other = await read(await generate(cluster, sampling={"max_tokens": 100}))
    assert len(other.choices[0].token_ids) == 100
    await nothing_runs_on_workers(cluster)
    deltas = [event async for event in slow if isinstance(event, Delta)]
    assert [(delta.index, len(delta.content.token_ids), delta.content.offset) for delta in deltas] == [(0, 300, 0), (1, 300, 0)]
    assert deltas[0].content.text == decoded(cluster, expected_tokens(PROMPT, 300))


async def nothing_runs_on_workers(cluster: Cluster) -> None:
    await eventually(lambda: cluster.service.status().num_running == 0)


async def test_a_reader_is_woken_once_a_step_however_many_choices(
    start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = await start_cluster(step_s=0.005)
    engine = cluster.launcher.launched[0].engine
    engine.gate.clear()  # until all choices are there: each step then has a token of every one
    handle = await generate(cluster, sampling={"n": 8, "max_tokens": 10})
    wakes, real_wait = 0, Turn.wait

    async def counted(turn: Turn) -> None:
        nonlocal wakes
        wakes += 1
        await real_wait(turn)

    monkeypatch.setattr(Turn, "wait", counted)
    await eventually(lambda: len(engine.submitted) == 8)
    engine.gate.set()
    answer = await read(handle)
    assert sum(len(choice.token_ids) for choice in answer.choices.values()) == 80
    assert wakes <= 14


async def test_echo_puts_the_prompt_before_every_choice(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    answer = await read(await generate(cluster, "Once upon", echo=True, sampling={"n": 2, "max_tokens": 3}))
    for choice in answer.choices.values():
        assert choice.text.startswith("Once upon")
        assert len(choice.token_ids) == 3
    by_ids = await read(await generate(cluster, [40, 41], echo=True, sampling={"max_tokens": 1}))
    assert by_ids.choices[0].text.startswith(decoded(cluster, [40, 41]))


async def test_chat_goes_through_the_template(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    messages = [{"role": "user", "content": "Hi"}]
    handle = await cluster.service.start_request(messages=messages, sampling={"max_tokens": 2})
    await read(handle)
    engine = cluster.launcher.launched[0].engine
    assert decoded(cluster, list(engine.submitted[-1].prompt_token_ids)) == "<user>Hi\n<assistant>"
    tokens = await cluster.service.tokenize(messages=messages)
    assert tokens.token_ids == engine.submitted[-1].prompt_token_ids
    assert b"".join(tokens.tokens) == b"<user>Hi\n<assistant>"
    messages.append({"role": "assistant", "content": "He"})
    await read(await cluster.service.start_request(messages=messages, sampling={"max_tokens": 2}, continue_final_message=True))
    assert decoded(cluster, list(engine.submitted[-1].prompt_token_ids)) == "<user>Hi\n<assistant>He"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"prompt": ""}, InvalidRequest, "empty"),
        ({"prompt": [999]}, InvalidRequest, "vocabulary"),
        ({"prompt": None}, InvalidRequest, "either a prompt or messages"),
        ({"model": "other"}, ModelNotFound, "'tiny'"),
        ({"request_id": "a b"}, InvalidRequest, "request_id"),
        ({"request_id": "running"}, InvalidRequest, "in flight"),
        ({"timeout_s": 0.0}, InvalidRequest, "timeout"),
        ({"priority": 2**31}, InvalidRequest, "priority"),
        ({"sampling": {"max_tokens": 5000}}, InvalidRequest, "4096"),
        ({"sampling": {"temprature": 1}}, InvalidRequest, "'temperature'"),
        ({"messages": [], "prompt": None}, InvalidRequest, "messages"),
    ],
)
async def test_what_cannot_run_is_refused_before_any_event(
    start_cluster: StartCluster, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    cluster = await start_cluster()
    cluster.launcher.launched[0].engine.gate.clear()
    running = await generate(cluster, request_id="running")
    arguments = {"prompt": PROMPT, "sampling": {"max_tokens": 5}, **options}
    with pytest.raises(error, match=says):
        await cluster.service.start_request(**arguments)
    cluster.launcher.launched[0].engine.gate.set()
    await read(running)
    await nothing_runs(cluster)


async def test_an_engine_error_reaches_the_reader_and_ends_all_choices(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.005)
    engine = cluster.launcher.launched[0].engine
    handle = await generate(cluster, sampling={"n": 2, "max_tokens": 4000})
    answer = Answer()
    await read_until(handle, answer, lambda a: a.num_deltas >= 2)
    failing = engine.submitted[1].request_id
    engine._command(lambda: engine.scheduler.fail(failing, "a row went wrong"))
    with pytest.raises(InternalError, match="a row went wrong"):
        await read(handle, into=answer)
    await nothing_runs(cluster)


async def test_models_and_status(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    (card,) = cluster.service.models()
    assert (card.name, card.architecture, card.max_model_len) == ("tiny", "Fake", 4096)
    await read(await generate(cluster))
    status = cluster.service.status()
    assert (status.model, status.num_requests, status.num_restarts) == ("tiny", 1, 0)
    assert status.grpc_address.startswith("127.0.0.1:")
    assert status.sampling_defaults["temperature"] == "1.0"
    (replica,) = status.replicas
    assert (replica.name, replica.state, replica.address) == (
        "replica-0",
        "ready",
        cluster.launcher.launched[0].address,
    )
    assert replica.last_step_id >= 20


async def test_shutdown_ends_queued_and_running_requests(start_cluster: StartCluster, caplog: pytest.LogCaptureFixture) -> None:
    cluster = await start_cluster(max_num_seqs=1, step_s=0.01)
    handles = [await generate(cluster, sampling={"max_tokens": 4000}) for _ in range(4)]
    stopping = asyncio.create_task(cluster.controller.stop())
    for handle in handles:
        with pytest.raises(Unavailable, match="shutting down"):
            await read(handle)
    await stopping
    with pytest.raises(Unavailable, match="shutting down"):
        await generate(cluster)
    await cluster.controller.stop()
    assert "goes on elsewhere" not in caplog.text


async def test_shutdown_with_grace_lets_running_requests_end(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.005)
    handle = await generate(cluster, sampling={"max_tokens": 60})
    await read_until(handle, Answer(), lambda a: a.num_deltas >= 1)
    stopping = asyncio.create_task(cluster.controller.stop(grace_s=20))
    events = [event async for event in handle]
    assert events[-1].completion_tokens == 60
    await stopping


async def test_a_deadline_ends_a_request_that_is_being_prepared(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    front_end, done = cluster.service._front_end, threading.Event()
    busy = [front_end._pool.submit(done.wait, 30) for _ in range(2)]  # long prompts of others, say
    try:
        with pytest.raises(DeadlineExceeded):
            async with asyncio.timeout(60):
                await cluster.service.start_request(prompt="x" * 2000, sampling={}, timeout_s=0.2)
        assert cluster.controller._intake.streams.in_flight() == []
        assert not any(future.done() for future in busy)
    finally:
        done.set()


async def test_long_texts_wait_for_each_other_only(start_cluster: StartCluster) -> None:
    cluster = await start_cluster()
    front_end, done = cluster.service._front_end, threading.Event()
    front_end._pool_of_long.submit(done.wait, 30)
    try:
        long = asyncio.create_task(cluster.service.start_request(prompt="x" * 200_000, sampling={"max_tokens": 2}))
        await read(await cluster.service.start_request(prompt="x", sampling={"max_tokens": 2}))
        assert not long.done()
    finally:
        done.set()
    with pytest.raises(InvalidRequest, match="the prompt has 200000 tokens"):
        await long
