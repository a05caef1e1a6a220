"""Step plans over gRPC on loopback: the verbs and errors of the ring, between nodes."""

from __future__ import annotations

import random
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace

import pytest
from parts import AUTHORITY, LEADER, LEADER_NAME
from pilotfish.common.errors import InternalError
from pilotfish.common.identity import Identity
from pilotfish.controller.authority import Authority
from pilotfish.workers.plan_channel import ChannelClosed, LostReader, MessageTooLarge, SlowReader
from pilotfish.workers.plan_codec import PlanDecoder, encode_plan
from pilotfish.workers.plan_stream import PlanFollower, PlanServer
from plan_ends import PATIENCE_S, follow_all, hear, process
from random_plans import random_plans

EPOCH = 4
RANK = AUTHORITY.issue("replica-0.3.1")
StartServer = Callable[..., tuple[PlanServer, str]]


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    with ExitStack() as stack:

        def start(*followers: str, **options: int) -> tuple[PlanServer, str]:
            server = PlanServer(epoch=EPOCH, followers=followers, identity=LEADER, **options)
            stack.callback(server.close, 1.0)
            return server, server.start(host="127.0.0.1")

        yield start


def follower_of(
    address: str,
    name: str,
    *,
    epoch: int = EPOCH,
    timeout_s: float = PATIENCE_S,
    leader: str = LEADER_NAME,
    identity: Identity = RANK,
    **options: int,
) -> PlanFollower:
    return PlanFollower(address, epoch=epoch, follower=name, leader=leader, identity=identity, timeout_s=timeout_s, **options)


def test_processes_receive_everything_and_then_the_end(start_server: StartServer) -> None:
    rng = random.Random(1)
    messages = [rng.randbytes(rng.choice((1, 5000, rng.randrange(600_000)))) for _ in range(100)]
    server, address = start_server("rank 1", "rank 2")
    with ExitStack() as stack:
        pipes = [
            stack.enter_context(process(follow_all, address, EPOCH, name, LEADER_NAME, RANK))[1]
            for name in ("rank 1", "rank 2")
        ]
        server.wait_for_followers(PATIENCE_S)
        for message in messages:
            server.send(message, PATIENCE_S)
        server.close(PATIENCE_S)
        for pipe in pipes:
            assert hear(pipe) == "here"
            assert [hear(pipe) for _ in messages] == [(len(message), zlib.crc32(message)) for message in messages]
            assert "closed" in str(hear(pipe))


def test_plans_survive(start_server: StartServer) -> None:
    plans = list(random_plans(random.Random(2), num_plans=30))
    server, address = start_server("rank 1")
    decoder = PlanDecoder(epoch=EPOCH)
    with closing(follower_of(address, "rank 1")) as follower:
        for plan in plans:
            server.send(encode_plan(plan, epoch=EPOCH), PATIENCE_S)
        for plan in plans:
            message = follower.receive(PATIENCE_S)
            assert message is not None
            assert decoder.decode(message) == plan
        assert follower.receive(0.0) is None
        assert follower.receive(0.01) is None


def test_what_was_sent_before_a_follower_came_waits_for_it(start_server: StartServer) -> None:
    server, address = start_server("rank 1")
    server.send(b"early", 0.1)
    with closing(follower_of(address, "rank 1")) as follower:
        assert follower.receive(PATIENCE_S) == b"early"


def test_close_wakes_a_follower_that_waits(start_server: StartServer) -> None:
    server, address = start_server("rank 1")
    with closing(follower_of(address, "rank 1")) as follower:
        threading.Timer(0.1, server.close).start()
        with pytest.raises(ChannelClosed, match="has closed"):
            follower.receive(PATIENCE_S)
        with pytest.raises(ChannelClosed, match="has closed"):
            follower.receive(0.0)


def test_a_slow_follower_is_named_and_a_failed_send_reaches_nobody(start_server: StartServer) -> None:
    server, address = start_server("rank 1", "rank 2", max_queued=2)
    message, num_sent = bytes(1_000_000), 0
    with closing(follower_of(address, "rank 1")) as quick, closing(follower_of(address, "rank 2", max_queued=1)) as slow:
        with pytest.raises(SlowReader, match="rank 2 is slow") as failure:  # noqa: PT012 - the network holds some
            while num_sent < 100:
                server.send(message, 0.3)
                num_sent += 1
                assert quick.receive(PATIENCE_S) == message
        assert failure.value.reader == "rank 2"
        assert quick.receive(0.1) is None
        assert [slow.receive(PATIENCE_S) for _ in range(num_sent)] == [message] * num_sent
        server.send(b"again", PATIENCE_S)
        assert quick.receive(PATIENCE_S) == slow.receive(PATIENCE_S) == b"again"


def test_a_killed_follower_is_named(start_server: StartServer) -> None:
    server, address = start_server("rank 1")
    with process(follow_all, address, EPOCH, "rank 1", LEADER_NAME, RANK) as (child, pipe):
        assert hear(pipe) == "here"
        child.kill()
        child.join(PATIENCE_S)
        end_s = time.monotonic() + PATIENCE_S
        with pytest.raises(LostReader, match="rank 1 is broken"):  # noqa: PT012 - its end travels through the network
            while time.monotonic() < end_s:
                server.send(b"x", PATIENCE_S)
                time.sleep(0.01)
    with pytest.raises(InternalError, match="has followed"):
        follower_of(address, "rank 1")


def test_a_follower_that_never_came_is_named(start_server: StartServer) -> None:
    server, _ = start_server("rank 1", max_queued=1)
    with pytest.raises(LostReader, match="rank 1"):
        server.wait_for_followers(0.01)
    server.send(b"one", 0.01)
    with pytest.raises(SlowReader, match="rank 1"):
        server.send(b"two", 0.01)
    with pytest.raises(MessageTooLarge):
        server.send(bytes(64 * 1024 * 1024 + 1), 0.01)


def test_only_this_epochs_followers_are_taken_once_each(start_server: StartServer) -> None:
    _, address = start_server("rank 1")
    with pytest.raises(InternalError, match="epoch 4, not 5"):
        follower_of(address, "rank 1", epoch=5)
    with pytest.raises(InternalError, match="no rank 'rank 7'"):
        follower_of(address, "rank 7")
    with closing(follower_of(address, "rank 1")), pytest.raises(InternalError, match="follows"):
        follower_of(address, "rank 1")


def test_only_parts_of_the_cluster_are_taken_and_followed(start_server: StartServer) -> None:
    _, address = start_server("rank 1")
    stranger = Authority.create().issue("replica-0.3.1")
    with pytest.raises(ChannelClosed, match="no part of this cluster"):
        follower_of(address, "rank 1", identity=stranger)
    with pytest.raises(ChannelClosed, match="stream of step plans broke"):
        follower_of(address, "rank 1", identity=replace(stranger, authority=AUTHORITY.certificate))
    with pytest.raises(ChannelClosed, match="no part of this cluster"):
        follower_of(address, "rank 1", leader="replica-0.2.0")
    for other in ("replica-0.2.1", "replica-1.3.1", "controller"):
        with pytest.raises(InternalError, match="is no rank of"):
            follower_of(address, "rank 1", identity=AUTHORITY.issue(other))
    follower_of(address, "rank 1").close()


def test_a_leader_that_does_not_answer(start_server: StartServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(ChannelClosed, match=r"did not answer within 0\.2 s"):
            follower_of(f"127.0.0.1:{silent.getsockname()[1]}", "rank 1", timeout_s=0.2)
        with pytest.raises(InternalError, match="cannot listen"):
            PlanServer(epoch=EPOCH, followers=[], identity=LEADER).start(host="127.0.0.1", port=silent.getsockname()[1])
