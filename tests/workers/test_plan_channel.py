"""The ring that carries step plans between processes: order, loss, slow and dead ends, and what is left behind."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import threading
import uuid
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from pilotfish.common.errors import ConfigError, InternalError
from pilotfish.common.requests import EngineRequest, TokenSampling
from pilotfish.scheduler.step_plan import AdmittedSequence, StepPlan
from pilotfish.workers import plan_channel
from pilotfish.workers.plan_channel import ChannelClosed, LostReader, MessageTooLarge, Reader, SlowReader, Writer
from pilotfish.workers.plan_codec import PlanDecoder, encode_plan
from pilotfish.workers.shared_segment import SharedSegment
from plan_ends import PATIENCE_S, answer, hear, pause, process, read_all, woken, write_and_wait

EPOCH = 3
SMALL = {"num_slots": 4, "slot_bytes": 64}  # a ring of 256 bytes


@pytest.fixture
def name() -> Iterator[str]:
    name = f"pilotfish-test-{uuid.uuid4().hex}-epoch-{EPOCH}"
    yield name
    left = list(Path("/dev/shm").glob(f"{name}*"))
    for path in left:
        path.unlink()
    assert not left


@pytest.fixture
def told_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No end looks by itself: who is not woken waits until its time is over."""
    monkeypatch.setattr(plan_channel, "_LIVENESS_INTERVAL_S", PATIENCE_S)
    monkeypatch.setattr(plan_channel, "_DOZE_AFTER_MESSAGE_S", 0.0)


def reader_of(name: str, index: int = 0) -> Reader:
    return Reader(name, epoch=EPOCH, index=index, timeout_s=PATIENCE_S)


def random_messages(seed: int, count: int, *, max_bytes: int) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(rng.choice((0, 1, 63, 64, 65, rng.randrange(max_bytes)))) for _ in range(count)]


def test_messages_of_every_size_arrive_in_order(name: str) -> None:
    messages = random_messages(1, 300, max_bytes=2000)
    received: list[list[bytes | None]] = [[], [], []]

    def read(index: int) -> None:
        with closing(reader_of(name, index)) as reader:
            received[index].extend(reader.receive(PATIENCE_S) for _ in messages)

    with closing(Writer(name, epoch=EPOCH, readers=["a", "b", "c"], **SMALL)) as writer:
        threads = [threading.Thread(target=read, args=(index,), daemon=True) for index in range(3)]
        for thread in threads:
            thread.start()
        for message in messages:
            writer.send(message, PATIENCE_S)
        for thread in threads:
            thread.join(PATIENCE_S)
    assert received == [messages] * 3


def test_processes_receive_everything_and_then_the_end(name: str) -> None:
    messages = random_messages(2, 200, max_bytes=300_000)
    with closing(Writer(name, epoch=EPOCH, readers=["rank 1", "rank 2"], num_slots=4)) as writer, ExitStack() as stack:
        ends = [stack.enter_context(process(read_all, name, EPOCH, index, 0.0)) for index in range(2)]
        writer.wait_for_readers(PATIENCE_S)
        assert not (Path("/dev/shm") / name).exists()
        for message in messages:
            writer.send(message, PATIENCE_S)
        writer.close()
        for child, pipe in ends:
            assert hear(pipe) == "here"
            assert [hear(pipe) for _ in messages] == [(len(message), zlib.crc32(message)) for message in messages]
            assert "closed" in str(hear(pipe))
            child.join(PATIENCE_S)
            assert child.exitcode == 0


@pytest.mark.usefixtures("told_only")
def test_no_wake_is_lost(name: str) -> None:
    """A message goes only when the one before has come back, so that none makes up for one that nobody was woken for."""
    messages = random_messages(3, 2000, max_bytes=600)
    rng = random.Random(4)
    with (
        closing(Writer(name, epoch=EPOCH, readers=["rank 1"], **SMALL)) as writer,
        process(answer, name, EPOCH, *SMALL.values(), len(messages)) as (_, pipe),
        closing(reader_of(f"{name}-back")) as back,
    ):
        writer.wait_for_readers(PATIENCE_S)
        for message in messages:
            with woken():
                writer.send(message, PATIENCE_S)
                pause(rng)
                assert back.receive(PATIENCE_S) == message
        assert hear(pipe) == "done"


@pytest.mark.usefixtures("told_only")
def test_what_the_other_end_does_just_before_one_sleeps_is_not_slept_over(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wait, acts = SharedSegment.wait, []

    def act_and_wait(segment: SharedSegment, word: int, seen: int, timeout_s: float) -> None:
        acts.pop()()
        wait(segment, word, seen, timeout_s)

    with closing(Writer(name, epoch=EPOCH, readers=["rank 1"], **SMALL)) as writer, closing(reader_of(name)) as reader, woken():
        monkeypatch.setattr(SharedSegment, "wait", act_and_wait)
        acts.append(lambda: writer.send(b"one", 1.0))
        assert reader.receive(PATIENCE_S) == b"one"
        for _ in range(4):
            writer.send(b"x", 1.0)
        acts.append(lambda: [reader.receive(1.0) for _ in range(4)])
        writer.send(b"two", PATIENCE_S)
        assert reader.receive(1.0) == b"two"
        assert not acts


@pytest.mark.usefixtures("told_only")
def test_close_wakes_a_reader_that_waits(name: str) -> None:
    writer = Writer(name, epoch=EPOCH, readers=["rank 1"])
    with closing(reader_of(name)) as reader, woken():
        threading.Timer(0.1, writer.close).start()
        with pytest.raises(ChannelClosed, match="closed"):
            reader.receive(PATIENCE_S)


def test_the_plan_of_a_very_long_prompt(name: str) -> None:
    tokens = tuple(range(128 * 1024))
    sampling = TokenSampling(temperature=0.0, max_tokens=1, seed=0)
    request = EngineRequest(request_id="long", prompt_token_ids=tokens, sampling=sampling)
    plan = StepPlan(1, (AdmittedSequence(request, 0, tokens, (), 0, 0),), (), ())
    with (
        closing(Writer(name, epoch=EPOCH, readers=["rank 1"])) as writer,
        closing(reader_of(name)) as reader,
    ):
        writer.send(encode_plan(plan, epoch=EPOCH), 1.0)
        message = reader.receive(1.0)
    assert message is not None
    assert PlanDecoder(epoch=EPOCH).decode(message) == plan


def test_a_slow_reader_is_named_and_a_failed_send_can_be_repeated(name: str) -> None:
    with (
        closing(Writer(name, epoch=EPOCH, readers=["rank 1", "rank 2"], **SMALL)) as writer,
        closing(reader_of(name, 0)) as quick,
        closing(reader_of(name, 1)) as slow,
    ):
        writer.send(b"first", 0.01)
        writer.send(bytes(100), 0.01)  # two fragments: one slot is left
        assert [quick.receive(0.0), quick.receive(0.0)] == [b"first", bytes(100)]
        with pytest.raises(SlowReader, match="rank 2 has taken 0 fragments of 4") as failure:
            writer.send(b"x" * 100, 0.02)
        assert failure.value.reader == "rank 2"
        assert quick.receive(0.0) is None
        assert [slow.receive(0.0), slow.receive(0.0)] == [b"first", bytes(100)]
        assert slow.receive(0.0) is None
        writer.send(b"again", 0.01)
        assert quick.receive(0.0) == slow.receive(0.0) == b"again"


def test_a_reader_that_never_came_is_named(name: str) -> None:
    with closing(Writer(name, epoch=EPOCH, readers=["rank 1", "rank 2"], **SMALL)) as writer, closing(reader_of(name, 1)):
        with pytest.raises(LostReader, match="rank 1"):
            writer.wait_for_readers(0.01)
        with pytest.raises(SlowReader, match="rank 1 has not opened"):
            writer.send(bytes(1000), 0.01)


def test_a_reader_that_left_is_named_at_once(name: str) -> None:
    with closing(Writer(name, epoch=EPOCH, readers=["rank 1"])) as writer:
        reader_of(name).close()
        with pytest.raises(LostReader, match="rank 1 has closed"):
            writer.send(b"x", PATIENCE_S)


def test_a_killed_reader_is_found_and_leaves_nothing(name: str) -> None:
    with closing(Writer(name, epoch=EPOCH, readers=["rank 1"], **SMALL)) as writer:
        with process(read_all, name, EPOCH, 0, PATIENCE_S) as (child, pipe):
            assert hear(pipe) == "here"
            child.kill()
            child.join(PATIENCE_S)
        with pytest.raises(LostReader, match=f"rank 1 .process {child.pid}. is gone"):
            writer.send(bytes(1000), PATIENCE_S)


def test_a_reader_that_is_killed_while_the_writer_waits_for_room_is_found(name: str) -> None:
    with (
        closing(Writer(name, epoch=EPOCH, readers=["rank 1"], **SMALL)) as writer,
        process(read_all, name, EPOCH, 0, PATIENCE_S) as (child, pipe),
    ):
        assert hear(pipe) == "here"
        threading.Timer(0.1, child.kill).start()
        with pytest.raises(LostReader, match=f"rank 1 .process {child.pid}. is gone"):
            writer.send(bytes(1000), PATIENCE_S)


@pytest.mark.usefixtures("told_only")
def test_a_reader_that_leaves_wakes_a_writer_that_waits_for_room(name: str) -> None:
    with closing(Writer(name, epoch=EPOCH, readers=["rank 1"], **SMALL)) as writer, woken():
        threading.Timer(0.1, reader_of(name).close).start()
        with pytest.raises(LostReader, match="is gone"):
            writer.send(bytes(1000), PATIENCE_S)


@pytest.mark.usefixtures("told_only")
def test_a_reader_that_comes_wakes_a_writer_that_waits_for_it(name: str) -> None:
    ends: list[Reader] = []
    with closing(Writer(name, epoch=EPOCH, readers=["rank 1"])) as writer, woken():
        coming = threading.Timer(0.1, lambda: ends.append(reader_of(name)))
        coming.start()
        writer.wait_for_readers(PATIENCE_S)
        coming.join()
    ends[0].close()


def test_a_writer_that_is_killed_while_a_reader_waits_is_found(name: str) -> None:
    with process(write_and_wait, name, EPOCH) as (child, pipe), closing(reader_of(name)) as reader:
        assert hear(pipe) == "sent"
        assert reader.receive(PATIENCE_S) == b"one"
        threading.Timer(0.1, child.kill).start()
        with pytest.raises(ChannelClosed, match="died"):
            reader.receive(PATIENCE_S)


def test_a_killed_writer_is_found_and_leaves_nothing(name: str) -> None:
    with process(write_and_wait, name, EPOCH) as (child, pipe), closing(reader_of(name)) as reader:
        assert hear(pipe) == "sent"
        child.kill()
        child.join(PATIENCE_S)
        assert reader.receive(PATIENCE_S) == b"one"
        with pytest.raises(ChannelClosed, match="died"):
            reader.receive(PATIENCE_S)


def test_only_this_epochs_readers_come_in_once_each(name: str) -> None:
    with pytest.raises(ChannelClosed, match="no channel"):
        Reader(name, epoch=EPOCH, index=0, timeout_s=0.01)
    with closing(Writer(name, epoch=EPOCH, readers=["rank 1"])), closing(reader_of(name)):
        with pytest.raises(InternalError, match="epoch 3, not 4"):
            Reader(name, epoch=4, index=0, timeout_s=1)
        with pytest.raises(InternalError, match="here already"):
            reader_of(name, 0)
        with pytest.raises(InternalError, match="none of index 1"):
            reader_of(name, 1)


def test_names(name: str) -> None:
    with closing(Writer(name, epoch=EPOCH, readers=[])), pytest.raises(ConfigError, match="exists"):
        Writer(name, epoch=EPOCH, readers=[])
    with pytest.raises(ConfigError, match="plain word"):
        Writer("../elsewhere", epoch=EPOCH, readers=[])


def test_a_writer_that_is_forgotten_removes_its_name(name: str) -> None:
    writer = Writer(name, epoch=EPOCH, readers=["rank 1"])
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            writer.close()  # a forked child has no say in it
        os._exit(0)
    os.waitpid(child, 0)
    assert (Path("/dev/shm") / name).exists()
    del writer
    assert not (Path("/dev/shm") / name).exists()


def test_limits(name: str) -> None:
    with closing(Writer(name, epoch=EPOCH, readers=[], max_message_bytes=100)) as writer:
        writer.send(bytes(100), 0.0)
        with pytest.raises(MessageTooLarge, match="101 bytes"):
            writer.send(bytes(101), 0.0)
    with pytest.raises(ConfigError, match="not to be had"):
        Writer(name, epoch=EPOCH, readers=[], num_slots=2**20, slot_bytes=2**30)


def test_bytes_that_are_seen_after_their_number_are_waited_for(name: str) -> None:
    """What a processor may show that reorders stores."""
    with closing(Writer(name, epoch=EPOCH, readers=["rank 1"], **SMALL)) as writer, closing(reader_of(name)) as reader:
        segment = SharedSegment.open(name)
        first_slot = 3 * 64
        writer.send(b"late", 0.0)
        segment.data[first_slot + 64 : first_slot + 68] = b"\0\0\0\0"
        assert reader.receive(0.01) is None
        segment.data[first_slot + 64 : first_slot + 68] = b"late"
        assert reader.receive(0.01) == b"late"
        writer.send(b"never", 0.0)
        segment.data[first_slot + 128 + 64] ^= 1
        with pytest.raises(InternalError, match="damaged"):
            reader.receive(PATIENCE_S)
        segment.close()


def test_an_idle_reader_sleeps(name: str) -> None:
    with closing(Writer(name, epoch=EPOCH, readers=["rank 1"])) as writer, closing(reader_of(name)) as reader:
        writer.send(b"x", 1.0)
        assert reader.receive(1.0) == b"x"
        assert reader.receive(0.2) is None  # it looks by itself for a while
        before = resource.getrusage(resource.RUSAGE_THREAD)
        assert reader.receive(1.0) is None
        after = resource.getrusage(resource.RUSAGE_THREAD)
        assert after.ru_nvcsw - before.ru_nvcsw < 20
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
