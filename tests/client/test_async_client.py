import asyncio
import gc

import pytest
from pilotfish import AsyncClient
from pilotfish.client import RetryPolicy
from pilotfish.common.errors import Cancelled, DeadlineExceeded, InternalError, InvalidRequest, Overloaded, Unavailable

QUICK = RetryPolicy(initial_backoff_s=0.01, jitter=False)


@pytest.fixture
async def client(server):
    async with AsyncClient(server.address, retry=QUICK) as client:
        yield client


async def cancelled_on(server):
    return await asyncio.to_thread(server.inference.cancelled.wait, 10)


async def test_answers(client):
    completion = await client.generate("count 3", n=2)
    assert [choice.text for choice in completion.choices] == ["1 2 3 ", "1 2 3 "]
    assert completion.usage.completion_tokens == 6
    assert (await client.chat([{"role": "user", "content": "Hi"}])).text == "user: Hi"
    stream = client.stream_chat("Hi")
    assert [delta.text async for delta in stream] == ["user: Hi"]
    assert stream.completion.request_id == stream.request_id == "chat"
    assert [delta async for delta in stream] == []


async def test_short_calls(client):
    assert await client.abort("known") is True
    assert (await client.tokenize("a b")).token_ids == (0, 1)
    assert [card.name for card in await client.models()] == ["served"]
    assert [replica.state for replica in (await client.status()).replicas] == ["ready"]


async def test_many_at_once(client):
    answers = await asyncio.gather(*(client.generate(f"count {k}") for k in range(1, 33)))
    assert [len(answer.token_ids) for answer in answers] == list(range(1, 33))


async def test_the_deadline(client, server):
    stream = client.stream_generate("forever", timeout_s=0.3)
    with pytest.raises(DeadlineExceeded, match=r"timeout_s=0\.3"):
        await stream.read_all()
    assert stream.text.startswith("0 1 ")
    assert await cancelled_on(server)


@pytest.mark.parametrize("how", ["aclose", "with", "dropped", "task cancelled", "client closed"])
async def test_leaving_a_stream_cancels_the_call_on_the_server(client, server, how):
    stream = client.stream_generate("forever")
    if how == "with":
        async with stream:
            await anext(stream)
    else:
        await anext(stream)
    if how == "aclose":
        await stream.aclose()
        with pytest.raises(Cancelled):
            await anext(stream)
    elif how == "client closed":
        await client.aclose()
        with pytest.raises(Cancelled):
            await stream.read_all()
    elif how == "dropped":
        del stream
        gc.collect()
    elif how == "task cancelled":
        task = asyncio.create_task(stream.read_all())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await cancelled_on(server)


async def test_closing_from_another_task_wakes_the_reader(client):
    stream = client.stream_generate("forever")
    reader = asyncio.create_task(stream.read_all())
    async with asyncio.timeout(60):
        while not stream.completion.token_ids:  # closed before, it would say that it was
            await asyncio.sleep(0.01)
    await stream.aclose()
    with pytest.raises(Cancelled, match="ended by this client"):
        await reader


async def test_short_calls_have_a_deadline_and_end_with_the_client_or_the_task(server):
    async with AsyncClient(server.address, short_timeout_s=0.1) as client:
        with pytest.raises(DeadlineExceeded):
            await client.abort("slow")
    client = AsyncClient(server.address)
    for end in (lambda task: task.cancel(), lambda task: asyncio.create_task(client.aclose())):
        task = asyncio.create_task(client.abort("slow"))
        await asyncio.sleep(0.1)
        end(task)
        with pytest.raises((Cancelled, asyncio.CancelledError)) as caught:
            await task
        assert task.cancelled() == (caught.type is asyncio.CancelledError)
    assert caught.type is Cancelled


async def test_errors_and_attempts(client, server):
    assert (await client.generate("fail unavailable 2")).text == "1 2 3 "
    with pytest.raises(InvalidRequest, match="the server says invalid_request"):
        await client.generate("fail invalid_request 1")
    with pytest.raises(Overloaded) as caught:
        await client.abort("fail overloaded 9")
    assert caught.value.retry_after_s == 0.15
    assert len(server.inference.requests) == 3 + 1 + 3
    stream = client.stream_generate("late unavailable")
    with pytest.raises(Unavailable):
        await stream.read_all()
    assert stream.text == "0 1 "
    with pytest.raises(InternalError, match="before its answer was complete"):
        await client.generate("unfinished")


async def test_a_server_killed_in_mid_stream(server_process):
    process, address = server_process
    async with AsyncClient(address, retry=RetryPolicy(reconnect_timeout_s=0.3)) as client:
        stream = client.stream_generate("forever")
        await anext(stream)
        process.kill()
        with pytest.raises(Unavailable, match="was lost before the answer was complete"):
            await stream.read_all()


async def test_unreachable_and_closed():
    client = AsyncClient("127.0.0.1:1", retry=RetryPolicy(max_attempts=1))
    with pytest.raises(Unavailable, match=r"cannot reach a pilotfish server at 127\.0\.0\.1:1 "):
        await client.models()
    await client.aclose()
    with pytest.raises(Unavailable, match="this client is closed"):
        await client.generate("count 1")


def test_made_before_its_loop_runs(server):
    client = AsyncClient(server.address)

    async def main():
        async with client:
            return (await client.generate("count 1")).text

    assert asyncio.run(main()) == "1 "


def test_a_stream_left_when_its_loop_is_gone_is_quiet(server, recwarn, capsys):
    left = []

    async def main():
        stream = AsyncClient(server.address).stream_generate("forever")
        await anext(stream)
        left.append(stream)

    asyncio.run(main())
    left.clear()
    gc.collect()
    assert "Exception ignored" not in capsys.readouterr().err
    assert [str(warning.message) for warning in recwarn] == []
