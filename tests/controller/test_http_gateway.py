"""The OpenAI-style routes over a whole controller, through the official client and through bare sockets."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai
import pytest
from fake_engine import expected_tokens
from http_calls import get, post, raw
from local_workers import Cluster, StartCluster
from pilotfish.common import logs
from pilotfish.common.api_keys import hash_line, make_key
from pilotfish.common.config import TenantConfig
from pilotfish.common.requests import ExpertBalance
from reading import eventually

TEXT = "Hello there"
ClientOf = Callable[[Cluster], openai.AsyncOpenAI]


@pytest.fixture
async def client_of() -> AsyncIterator[ClientOf]:
    clients: list[openai.AsyncOpenAI] = []

    def make(cluster: Cluster) -> openai.AsyncOpenAI:
        url = f"http://{cluster.service.addresses.http}/v1"
        clients.append(openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=20))
        return clients[-1]

    yield make
    for client in clients:
        await client.close()


def answer_to(cluster: Cluster, text: str, num_tokens: int) -> str:
    tokenizer = cluster.service._front_end.tokenizer
    return tokenizer.decode(expected_tokens(tokenizer.encode(text), num_tokens))


def used_blocks(cluster: Cluster) -> int:
    return cluster.launcher.launched[0].engine.scheduler.load().num_used_blocks


async def test_a_completion_and_its_usage(start_cluster: StartCluster, client_of: ClientOf) -> None:
    cluster = await start_cluster()
    completion = await client_of(cluster).completions.create(model="tiny", prompt=TEXT, max_tokens=12)
    assert completion.choices[0].text == answer_to(cluster, TEXT, 12)
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (len(TEXT), 12)


async def test_completions_of_several_prompts_echo_and_say_16_tokens(start_cluster: StartCluster, client_of: ClientOf) -> None:
    cluster = await start_cluster()
    completion = await client_of(cluster).completions.create(model="tiny", prompt=["ab", "abc"], n=2, echo=True)
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert completion.choices[0].text == completion.choices[1].text == "ab" + answer_to(cluster, "ab", 16)
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (2 + 3, 4 * 16)


async def test_a_chat_streams_with_role_first_and_usage_last(start_cluster: StartCluster, client_of: ClientOf) -> None:
    cluster = await start_cluster()
    messages = [{"role": "developer", "content": "Be kind"}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    stream = await client_of(cluster).chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    rendered = "<system>Be kind\n<user>Hi\n<assistant>"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:-1])
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == answer_to(cluster, rendered, 20)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert (chunks[-1].choices, chunks[-1].usage.prompt_tokens) == ([], len(rendered))
    assert len({chunk.id for chunk in chunks}) == 1


async def test_a_streamed_completion_of_two_prompts_keeps_them_apart(start_cluster: StartCluster, client_of: ClientOf) -> None:
    cluster = await start_cluster()
    stream = await client_of(cluster).completions.create(model="tiny", prompt=["ab", "cde"], max_tokens=9, stream=True)
    texts = ["", ""]
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [answer_to(cluster, "ab", 9), answer_to(cluster, "cde", 9)]


async def test_logprobs_in_both_shapes(start_cluster: StartCluster, client_of: ClientOf) -> None:
    cluster = await start_cluster()
    client = client_of(cluster)
    messages = [{"role": "user", "content": "Hi"}]
    chat = await client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, logprobs=True, top_logprobs=0)
    content = chat.choices[0].logprobs.content
    assert [entry.logprob for entry in content] == [-1.0] * 5
    assert b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace") == chat.choices[0].message.content
    completion = await client.completions.create(model="tiny", prompt=TEXT, max_tokens=5, logprobs=0)
    logprobs = completion.choices[0].logprobs
    assert logprobs.token_logprobs == [-1.0] * 5
    assert logprobs.text_offset[0] == 0
    assert len(logprobs.tokens) == 5


async def test_stop_strings_end_the_text_and_the_work(start_cluster: StartCluster, client_of: ClientOf) -> None:
    cluster = await start_cluster()
    text = answer_to(cluster, TEXT, 40)
    completion = await client_of(cluster).completions.create(model="tiny", prompt=TEXT, max_tokens=40, stop=[text[10:13]])
    assert completion.choices[0].text == text[: text.index(text[10:13])]
    assert completion.choices[0].finish_reason == "stop"
    await eventually(lambda: used_blocks(cluster) == 0)


async def test_models_are_listed_and_shown(start_cluster: StartCluster, client_of: ClientOf) -> None:
    cluster = await start_cluster()
    client = client_of(cluster)
    assert [model.id async for model in client.models.list()] == ["tiny"]
    assert (await client.models.retrieve("tiny")).id == "tiny"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        await client.models.retrieve("large")


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("completions", {"prompt": ""}, "empty"),
        ("completions", {}, "prompt: Field required"),
        ("completions", {"prompt": "x", "temprature": 1}, "did you mean 'temperature'"),
        ("completions", {"prompt": "x", "temperature": -1}, "temperature must be"),
        ("completions", {"prompt": "x", "temperature": "hot"}, "temperature: "),
        ("completions", {"prompt": "x", "top_p": 0}, "top_p must be"),
        ("completions", {"prompt": "x", "max_tokens": 5000}, "5000"),
        ("completions", {"prompt": [5000]}, "5000"),
        ("completions", {"prompt": "x", "logprobs": 99}, "logprobs must be"),
        ("completions", {"prompt": "x", "stream_options": {}}, "stream: true"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", b"\xff\xfe", "not valid UTF-8"),
        ("completions", b"[1]", "JSON object"),
        ("completions", b"{", "not valid JSON"),
        ("completions", b"[" * 100_000, "not valid JSON"),
        ("completions", b'{"prompt": "\\ud800"}', "surrogate"),
        ("chat/completions", {"messages": []}, "message"),
        ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, "role"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": []}, "'tools' is not supported"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 1}, "logprobs: true"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content"),
    ],
)
async def test_bad_input_is_a_400_that_says_why(start_cluster: StartCluster, path: str, body: Any, message: str) -> None:
    cluster = await start_cluster()
    status, _, answer = await post(cluster, f"/v1/{path}", body)
    assert (status, answer["error"]["type"], answer["error"]["code"]) == (400, "invalid_request_error", "invalid_request")
    assert message in answer["error"]["message"]


async def test_an_unknown_model_a_wrong_path_and_a_wrong_method(start_cluster: StartCluster, client_of: ClientOf) -> None:
    cluster = await start_cluster()
    with pytest.raises(openai.NotFoundError) as caught:
        await client_of(cluster).completions.create(model="large", prompt="x")
    assert caught.value.code == "model_not_found"
    assert (await get(cluster, "/v2/nothing"))[0] == 404
    assert (await get(cluster, "/v1/completions"))[0] == 405


async def test_a_large_body_is_refused_before_it_is_read(start_cluster: StartCluster, client_of: ClientOf) -> None:
    cluster = await start_cluster(gateway={"max_body_bytes": 10_000})
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 104857600\r\n\r\n"
    status, headers, answer = await raw(cluster, head + b"x" * 1000)
    assert (status, answer["error"]["code"], headers["connection"]) == (413, "request_too_large", "close")
    chunks = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    status, _, _ = await raw(
        cluster, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks * 4
    )
    assert status == 413
    assert (await client_of(cluster).completions.create(model="tiny", prompt="x", max_tokens=1)).choices


@pytest.mark.parametrize("stream", [True, False])
async def test_closing_the_connection_frees_the_blocks(start_cluster: StartCluster, stream: bool) -> None:
    cluster = await start_cluster(step_s=0.01)
    engine = cluster.launcher.launched[0].engine
    body = json.dumps({"prompt": TEXT, "max_tokens": 3000, "stream": stream}).encode()
    host, _, port = cluster.service.addresses.http.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    await eventually(lambda: used_blocks(cluster) > 0)
    writer.close()
    await eventually(lambda: used_blocks(cluster) == 0)
    assert len(engine.aborted) == 1


async def test_a_full_queue_is_a_429_with_retry_after(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(gateway={"max_queued_requests": 1}, max_num_seqs=1)
    engine = cluster.launcher.launched[0].engine
    engine.gate.clear()
    tasks = [asyncio.create_task(post(cluster, "/v1/completions", {"prompt": "x", "max_tokens": 2})) for _ in range(6)]
    await eventually(lambda: any(task.done() for task in tasks))
    engine.gate.set()
    answers = await asyncio.gather(*tasks)
    refused = [answer for answer in answers if answer[0] == 429]
    assert refused
    assert all(int(headers["retry-after"]) >= 1 and body["error"]["code"] == "overloaded" for _, headers, body in refused)
    assert {answer[0] for answer in answers} == {200, 429}


async def test_a_call_with_several_prompts_is_let_in_whole(start_cluster: StartCluster) -> None:
    """Else it would come back in vain for as long as the queue is full."""
    tenants = {"anonymous": TenantConfig(max_requests=3)}
    cluster = await start_cluster(max_num_seqs=1, gateway={"max_queued_requests": 1}, tenants=tenants)
    engine = cluster.launcher.launched[0].engine
    engine.gate.clear()
    alone = [asyncio.create_task(post(cluster, "/v1/completions", {"prompt": "x", "max_tokens": 2})) for _ in range(2)]
    await eventually(lambda: cluster.service.status().num_running == 2)  # one ahead
    call = asyncio.create_task(post(cluster, "/v1/completions", {"prompt": ["a", "b", "c"], "max_tokens": 2}))
    await eventually(lambda: cluster.service.status().num_queued == 3)
    assert (await post(cluster, "/v1/completions", {"prompt": "x"}))[0] == 429
    engine.gate.set()
    assert [status for status, _, _ in await asyncio.gather(*alone, call)] == [200, 200, 200]
    assert len((await call)[2]["choices"]) == 3


async def test_what_ends_one_prompt_ends_the_others_of_its_call(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.01)
    call = asyncio.create_task(
        post(cluster, "/v1/completions", {"prompt": ["a", "b", "c"], "max_tokens": 3000, "request_id": "r"})
    )
    await eventually(lambda: cluster.service.status().num_running == 3)
    assert await cluster.service.abort("r.1")
    status, _, answer = await call
    assert (status, answer["error"]["code"]) == (499, "cancelled")
    await eventually(lambda: used_blocks(cluster) == 0)


async def test_the_log_of_a_failed_call_names_its_request_and_nothing_forged(
    start_cluster: StartCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pilotfish")
    cluster = await start_cluster()
    lines = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append((record.getMessage(), logs.request_id.get()))

    async def fail(**_: Any) -> None:
        raise RuntimeError("a defect")

    handler = Lines()
    logging.getLogger("pilotfish").addHandler(handler)
    try:
        for request_id in ("mine", "one\ntwo"):
            await post(cluster, "/v1/completions", {"prompt": "x", "request_id": request_id, "user": "u"})
        monkeypatch.setattr(cluster.service, "start_request", fail)
        status, _, answer = await post(cluster, "/v1/completions", {"prompt": "x", "request_id": "other"})
    finally:
        logging.getLogger("pilotfish").removeHandler(handler)
    assert (status, answer["error"]["code"]) == (500, "internal")
    assert ("request mine is from user 'u'", "mine") in lines
    assert ("an HTTP call failed", "other") in lines
    assert not [line for line, _ in lines if "two" in line]


async def test_a_deadline_ends_the_request(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(step_s=0.01)
    status, _, answer = await post(cluster, "/v1/completions", {"prompt": "x", "max_tokens": 3000, "timeout_s": 0.3})
    assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
    await eventually(lambda: used_blocks(cluster) == 0)


async def test_an_error_after_the_start_of_a_stream_is_a_line_of_it(start_cluster: StartCluster, client_of: ClientOf) -> None:
    cluster = await start_cluster(step_s=0.01)
    stream = await client_of(cluster).completions.create(
        model="tiny", prompt=TEXT, max_tokens=3000, stream=True, extra_body={"timeout_s": 0.3}
    )
    with pytest.raises(openai.APIError, match="was not complete after"):
        async for _ in stream:
            pass


async def test_health_follows_the_replicas(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(fleet={"max_restarts": 0})
    status, _, body = await get(cluster, "/health")
    assert (status, body["status"]) == (200, "ok")
    await cluster.launcher.launched[0].kill()
    while status == 200:
        await asyncio.sleep(0.02)
        status, _, body = await get(cluster, "/health")
    assert (status, body["status"]) == (503, "unavailable")


async def test_metrics_count_what_happened(start_cluster: StartCluster, client_of: ClientOf) -> None:
    balance = ExpertBalance(measured=1.5, expected=1.25, num_moves=9, last_step_id=8)
    cluster = await start_cluster(expert_balance=balance)
    client = client_of(cluster)
    prompt = list(range(40))
    for _ in range(2):
        await client.completions.create(model="tiny", prompt=prompt, max_tokens=4)
    await post(cluster, "/v1/completions", {"prompt": ""})
    _, _, text = await get(cluster, "/metrics")
    lines = text.decode().splitlines()
    assert 'pilotfish_requests_total{outcome="ok"} 2.0' in lines
    assert 'pilotfish_requests_total{outcome="invalid_request"} 1.0' in lines
    assert "pilotfish_output_tokens_total 8.0" in lines
    assert "pilotfish_prefix_hit_tokens_total 32.0" in lines
    assert "pilotfish_ttft_seconds_count 2.0" in lines
    assert 'pilotfish_replicas{state="ready"} 1.0' in lines
    assert 'pilotfish_expert_balance_ratio{replica="replica-0"} 1.5' in lines
    assert 'pilotfish_expected_expert_balance_ratio{replica="replica-0"} 1.25' in lines
    assert 'pilotfish_expert_moves_total{replica="replica-0"} 9.0' in lines


async def test_a_port_in_use_is_named(start_cluster: StartCluster) -> None:
    from pilotfish.common.errors import ConfigError

    cluster = await start_cluster()
    for door in ("http", "grpc"):
        port = int(getattr(cluster.service.addresses, door).rpartition(":")[2])
        with pytest.raises(ConfigError, match=rf"{port}.*--{door}-port"):
            await start_cluster(gateway={f"{door}_port": port})


async def test_with_keys_every_route_but_health_needs_one(start_cluster: StartCluster) -> None:
    key, wrong = make_key(b"a" * 8, b"k" * 32), make_key(b"a" * 8, b"w" * 32)
    cluster = await start_cluster(tenants={"acme": TenantConfig(keys=(hash_line(key),))})
    for path in ("/v1/models", "/v1/models/tiny", "/metrics"):
        status, headers, answer = await raw(cluster, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert (status, headers["www-authenticate"], answer["error"]["type"]) == (401, "Bearer", "authentication_error")
    status, _, answer = await post(cluster, "/v1/completions", {"prompt": "x"})
    assert (status, answer["error"]["code"]) == (401, "unauthenticated")
    assert "PILOTFISH_API_KEY" in answer["error"]["message"]
    assert (await raw(cluster, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"))[0] == 200
    url = f"http://{cluster.service.addresses.http}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0) as client:
        done = await client.completions.create(model="tiny", prompt="x", max_tokens=2)
    assert done.usage.completion_tokens == 2
    async with openai.AsyncOpenAI(base_url=url, api_key=wrong, max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="not valid here"):
            await client.models.list()


async def test_the_place_of_a_refused_call_is_held_for_its_idempotency_key(start_cluster: StartCluster) -> None:
    cluster = await start_cluster(gateway={"max_queued_requests": 2}, max_num_seqs=1, step_s=0.02)
    body = json.dumps({"prompt": "x", "max_tokens": 10}).encode()

    async def call(number: int) -> list[int]:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nIdempotency-Key: {number}\r\n"
        statuses = []
        for _ in range(2):
            status, headers, _ = await raw(cluster, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            statuses.append(status)
            if status != 429:
                break
            await asyncio.sleep(int(headers["retry-after"]))
        return statuses

    answers = await asyncio.gather(*(call(number) for number in range(8)))
    retried = [statuses[1] for statuses in answers if len(statuses) == 2]
    assert len(retried) >= 3
    assert retried.count(200) > len(retried) / 2
