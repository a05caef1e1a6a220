import gc
import threading
import time

import pytest
from pilotfish import Client
from pilotfish.client import ChannelOptions, RetryPolicy
from pilotfish.common.errors import (
    STATUS_TABLE,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RequestTooLarge,
    Unauthenticated,
    Unavailable,
)
from pilotfish.common.requests import FinishReason
from scripted_server import ScriptedServer

ONCE = RetryPolicy(max_attempts=1)
QUICK = RetryPolicy(initial_backoff_s=0.01, jitter=False)


@pytest.fixture
def client(server):
    with Client(server.address, retry=QUICK) as client:
        yield client


def test_generate_returns_the_whole_answer(client, server):
    completion = client.generate("count 3", max_tokens=3, request_id="mine", model="served", priority=2, echo=True)
    assert completion.text == "1 2 3 "
    assert completion.token_ids == (10, 11, 12)
    assert completion.finish_reason == FinishReason.LENGTH == "length"
    assert [entry.token_id for entry in completion.logprobs] == [10, 11, 12]
    assert completion.logprobs[0].top[0].token == b"t"
    assert (completion.request_id, completion.model, completion.prompt_tokens) == ("mine", "served", 5)
    assert (completion.usage.completion_tokens, completion.usage.cached_tokens, completion.usage.replica) == (3, 4, "r0")
    (request,) = server.inference.requests
    assert (request.model, request.priority, request.echo, request.sampling.max_tokens) == ("served", 2, True, 3)


def test_token_ids_are_a_prompt(client, server):
    assert client.generate([5, 6, 7]).text == "1 2 "
    assert list(server.inference.requests[0].tokens.ids) == [5, 6, 7]


def test_of_several_addresses_the_next_is_tried(server):
    with Client(["127.0.0.1:1", server.address], retry=QUICK) as client:
        assert client.generate("count 2").text == "1 2 "
        assert client.address == server.address  # the next one begins there
        assert client.models()
    with pytest.raises(ConfigError, match="several of one cluster"):
        Client([])


def test_choices_are_told_apart(client):
    completion = client.generate("count 2", n=3)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert {choice.text for choice in completion.choices} == {"1 2 "}
    assert all(choice.finish_reason == FinishReason.LENGTH for choice in completion.choices)


def test_a_stream_gives_deltas_as_they_come(client):
    with client.stream_generate("count 3") as stream:
        deltas = []
        for delta in stream:
            deltas.append(delta)
            assert stream.text == "".join(d.text for d in deltas)
    assert [(d.text, d.token_ids, d.offset) for d in deltas] == [("1 ", (10,), 0), ("2 ", (11,), 1), ("3 ", (12,), 2)]
    assert [d.finish_reason for d in deltas] == [None, None, FinishReason.LENGTH]
    assert stream.request_id.startswith("sdk-")
    assert stream.completion.usage.completion_tokens == 3
    assert list(stream) == []


def test_chat_takes_messages_or_a_string(client, server):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert client.chat(messages, temperature=0).text == "system: Be brief. | user: Hi"
    assert client.chat("Hi").text == "user: Hi"
    assert "".join(delta.text for delta in client.stream_chat("Hé")) == "user: Hé"
    client.chat([*messages, {"role": "assistant", "content": "Yo"}], continue_final_message=True)
    assert [request.continue_final_message for request in server.inference.requests] == [False, False, False, True]


def test_short_calls(client):
    assert client.abort("known") is True
    assert client.abort("unknown") is False
    assert client.tokenize("a b").tokens == (b"a", b"b")
    assert [card.name for card in client.models()] == ["served"]
    assert [replica.state for replica in (client.status()).replicas] == ["ready"]
    assert client.tokenize([{"role": "user", "content": "whole"}]).tokens == (b"whole",)


def test_the_deadline_is_the_calls_and_what_arrived_stays(client, server):
    stream = client.stream_generate("forever", timeout_s=0.3)
    with pytest.raises(DeadlineExceeded, match=r"timeout_s=0\.3 passed before the answer of 127\.0\.0\.1"):
        stream.read_all()
    assert stream.text.startswith("0 1 ")
    assert stream.completion.finish_reason is None
    assert stream.completion.usage is None
    assert server.inference.times_remaining[0] < 1
    assert server.inference.cancelled.wait(10)


def test_the_clients_timeout_is_the_default(server):
    with Client(server.address, timeout_s=7) as client:
        client.generate("count 1")
        client.generate("count 1", timeout_s=3)
    assert 5 < server.inference.times_remaining[0] < 8
    assert server.inference.times_remaining[1] < 4


@pytest.mark.parametrize("how", ["close", "with", "dropped", "client closed"])
def test_leaving_a_stream_cancels_the_call_on_the_server(server, how):
    client = Client(server.address)
    stream = client.stream_generate("forever")
    if how == "with":
        with stream:
            next(stream)
    else:
        next(stream)
    if how == "close":
        stream.close()
    elif how == "client closed":
        client.close()
        with pytest.raises(Cancelled, match="ended by this client"):
            stream.read_all()
    elif how == "dropped":
        del stream
        gc.collect()
    assert server.inference.cancelled.wait(10)
    client.close()


def test_closing_from_another_thread_wakes_the_reader(client):
    stream = client.stream_generate("forever")
    next(stream)
    threading.Timer(0.05, stream.close).start()
    with pytest.raises(Cancelled, match="ended by this client"):
        stream.read_all()


def test_short_calls_have_a_deadline_and_end_with_the_client(server):
    with Client(server.address, short_timeout_s=0.1) as client, pytest.raises(DeadlineExceeded, match=r"timeout_s=0\.1"):
        client.abort("slow")
    client = Client(server.address)
    threading.Timer(0.1, client.close).start()
    with pytest.raises(Cancelled, match="ended by this client"):
        client.abort("slow")


def test_a_closed_client_says_so(server):
    client = Client(server.address)
    client.close()
    with pytest.raises(Unavailable, match="this client is closed"):
        client.generate("count 1")
    with pytest.raises(Unavailable, match="this client is closed"):
        client.models()


@pytest.mark.parametrize("row", STATUS_TABLE, ids=lambda row: row.error.code)
def test_every_error_class_arrives_as_itself(server, row):
    code = row.error.code
    with Client(server.address, retry=ONCE) as client:
        with pytest.raises(row.error, match=f"^the server says {code}$") as caught:
            client.generate(f"fail {code} 1")
        assert type(caught.value) is row.error
        assert caught.value.retry_after_s == (0.15 if code == "overloaded" else None)
        with pytest.raises(row.error, match=f"^the server says {code}$"):
            client.abort(f"fail {code} 1")


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (
            "UNAVAILABLE",
            Unavailable,
            r"cannot reach a pilotfish server at 127\.0\.0\.1:\d+ \(said UNAVAILABLE\).*pilotfish serve",
        ),
        ("CANCELLED", Unavailable, "ended the call; it may be shutting down"),
        ("DEADLINE_EXCEEDED", DeadlineExceeded, "the deadline passed"),
        ("RESOURCE_EXHAUSTED", Overloaded, "has no room"),
        ("UNAUTHENTICATED", Unauthenticated, "valid api_key="),
        ("PERMISSION_DENIED", Unauthenticated, "valid api_key="),
        ("UNIMPLEMENTED", ConfigError, "is it a pilotfish server"),
        ("INVALID_ARGUMENT", InvalidRequest, "said INVALID_ARGUMENT"),
        ("NOT_FOUND", ModelNotFound, "said NOT_FOUND"),
        ("FAILED_PRECONDITION", ConfigError, "said FAILED_PRECONDITION"),
        ("INTERNAL", InternalError, "ended the call with INTERNAL"),
        ("DATA_LOSS", InternalError, "ended the call with DATA_LOSS"),
    ],
)
def test_plain_statuses_of_gateways_in_between(server, status, error, message):
    with Client(server.address, retry=ONCE) as client, pytest.raises(error, match=message) as caught:
        client.generate(f"status {status}")
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("code", "num_calls"), [("unavailable", 3), ("overloaded", 3), ("internal", 1), ("invalid_request", 1)]
)
def test_what_is_tried_again(server, code, num_calls):
    with Client(server.address, retry=QUICK) as client:
        prompt = f"fail {code} 2"
        if num_calls == 3:
            assert client.generate(prompt).text == "1 2 3 "
            assert client.abort(prompt) is False
        else:
            with pytest.raises(Exception, match=code):
                client.generate(prompt)
            with pytest.raises(Exception, match=code):
                client.abort(prompt)
    assert len(server.inference.requests) == 2 * num_calls


def test_attempts_end(server):
    with Client(server.address, retry=QUICK) as client, pytest.raises(Unavailable):
        client.generate("fail unavailable 3")
    assert len(server.inference.requests) == 3


def test_the_servers_retry_after_is_waited_for(server):
    with Client(server.address, retry=QUICK) as client:
        start = time.monotonic()
        client.generate("fail overloaded 1")
        assert time.monotonic() - start >= 0.15  # far more than QUICK's own 10 ms


def test_a_wait_beyond_the_deadline_is_not_begun(server):
    with Client(server.address, retry=QUICK) as client, pytest.raises(Overloaded):
        client.generate("fail overloaded 1", timeout_s=0.1)
    assert len(server.inference.requests) == 1


def test_closing_ends_a_wait_for_another_attempt(server):
    with Client(server.address, retry=RetryPolicy(initial_backoff_s=600, max_backoff_s=600)) as client:
        stream = client.stream_generate("fail unavailable 1")
        threading.Timer(0.1, stream.close).start()
        with pytest.raises(Cancelled, match="closed"):
            stream.read_all()


def test_nothing_is_tried_again_after_the_first_token(client, server):
    stream = client.stream_generate("late unavailable")
    with pytest.raises(Unavailable, match="the server says unavailable"):
        stream.read_all()
    assert stream.text == "0 1 "
    assert len(server.inference.requests) == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("gap", "at token 2 instead of 1"), ("stray", "sent choice 3"), ("unfinished", "before its answer was complete")],
)
def test_a_server_that_breaks_the_protocol_is_caught(client, prompt, message):
    with pytest.raises(InternalError, match=message):
        client.generate(prompt)


def test_a_request_beyond_the_servers_size(client):
    with pytest.raises(RequestTooLarge, match="larger than max"):
        client.generate("x" * 200_000)


def test_an_answer_beyond_the_clients_size(server):
    client = Client(server.address, channel=ChannelOptions(max_receive_bytes=2_000))
    with client, pytest.raises(RequestTooLarge, match="larger than max"):
        client.tokenize("word " * 1_000)


def test_an_unreachable_address_says_what_to_start():
    with ScriptedServer() as gone:
        address = gone.address
    with Client(address, retry=ONCE) as client:
        for call in (lambda: client.generate("count 1"), client.status):
            with pytest.raises(Unavailable, match=f"cannot reach a pilotfish server at {address} .*`pilotfish serve MODEL`"):
                call()


def test_a_server_that_comes_back_is_found_again():
    with ScriptedServer() as first:
        client = Client(first.address, retry=RetryPolicy(max_attempts=50))
        assert client.generate("count 1").text == "1 "
    with client, ScriptedServer(port=int(first.address.rpartition(":")[2])):
        assert client.generate("count 1", timeout_s=30).text == "1 "


def test_a_server_killed_in_mid_stream(server_process):
    process, address = server_process
    with Client(address, retry=RetryPolicy(reconnect_timeout_s=0.3)) as client:
        stream = client.stream_generate("forever")
        assert next(stream).text == "0 "
        process.kill()
        with pytest.raises(Unavailable, match=f"the connection to {address} was lost before the answer was complete"):
            stream.read_all()
        assert stream.text.startswith("0 ")


def test_threads_share_a_client(client):
    results: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda k=k: results.update({k: client.generate(f"count {k}").text})) for k in range(1, 17)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == {k: "".join(f"{i} " for i in range(1, k + 1)) for k in range(1, 17)}


def test_the_token_travels_with_every_call(server):
    with Client(server.address, api_key="s3cret") as client:
        client.generate("count 1")
        client.abort("known")
    assert [metadata["authorization"] for metadata in server.inference.metadata] == ["Bearer s3cret"] * 2
    assert server.inference.metadata[0]["user-agent"].startswith("pilotfish/")
