"""Step plans between nodes: the messages of plan_channel.py over gRPC, a stream for each rank that is not on the leader's node.

`PlanServer` is the leader's end, `PlanFollower` a rank's. Both have the verbs and errors of the ring: `send` waits for room in
the queue of every follower and fails for all or for none; `receive` brings the next message, None, or ChannelClosed. A broken
stream is not taken up again, for plans are changes and a rank that lost one cannot go on: the epoch ends.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc

from ..common.errors import InternalError
from ..common.identity import Identity
from ..proto import worker_pb2, worker_pb2_grpc
from ..proto.credentials import channel_credentials, channel_options, explain, peer_name, server_credentials
from .plan_channel import ChannelClosed, LostReader, MessageTooLarge, SlowReader

_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_OPTIONS = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES + 1024),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES + 1024),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 5_000),  # a peer that is silently gone is found in 8 s
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 3_000),
]
_ACCEPTED = "pilotfish-accepted"  # in the metadata that comes before the first plan
_STOP_CHECK_S = 0.5  # how soon a thread that waits for nothing in particular notices that it should end


@dataclass(slots=True)
class _Follower:
    """A follower's queue. `in_write` is the message that gRPC has and the network may not have yet; it counts as queued."""

    name: str
    messages: deque[bytes] = field(default_factory=deque)
    in_write: bool = False
    is_here: bool = False
    is_lost: bool = False


class PlanServer(worker_pb2_grpc.PlanStreamServicer):
    """The leader's end. Construct, `start`, `wait_for_followers`, `send` each step's message, `close`."""

    def __init__(self, *, epoch: int, followers: Sequence[str], identity: Identity, max_queued: int = 32) -> None:
        """At most `max_queued` messages wait for each of the `followers`."""
        self._epoch = epoch
        self._identity = identity
        self._followers = {name: _Follower(name) for name in followers}
        self._max_queued = max_queued
        self._changed = threading.Condition()
        self._is_closed = False
        # A thread for each follower, and some to refuse others.
        threads = ThreadPoolExecutor(len(self._followers) + 2, thread_name_prefix="plan-server")
        self._server = grpc.server(threads, options=_OPTIONS)
        worker_pb2_grpc.add_PlanStreamServicer_to_server(self, self._server)

    def start(self, *, host: str, port: int = 0) -> str:
        """Serve; returns the address "host:port".

        Raises:
            InternalError: it cannot listen there.
        """
        try:
            bound_port = self._server.add_secure_port(f"{host}:{port}", server_credentials(self._identity))
        except RuntimeError as error:
            raise InternalError(f"the leader cannot listen for its ranks on {host}:{port}: {error}") from error
        self._server.start()
        return f"{host}:{bound_port}"

    def wait_for_followers(self, timeout_s: float) -> None:
        """Returns when all followers are here.

        Raises:
            LostReader: one has not come in time.
        """
        with self._changed:
            self._changed.wait_for(lambda: all(follower.is_here for follower in self._followers.values()), timeout_s)
            for name, follower in self._followers.items():
                if not follower.is_here:
                    raise LostReader(name, f"{name} did not ask for step plans within {timeout_s:g} s")

    def send(self, message: bytes, timeout_s: float) -> None:
        """Queues the message for every follower, waiting for room as long as `timeout_s`.

        Raises:
            SlowReader, LostReader: a follower did not take what came before; it is named, and nobody gets this message.
            MessageTooLarge: over 64 MiB.
        """
        if len(message) > _MAX_MESSAGE_BYTES:
            raise MessageTooLarge(
                f"a message of {len(message)} bytes; the stream of step plans takes up to {_MAX_MESSAGE_BYTES}"
            )
        followers = self._followers.values()
        with self._changed:
            self._changed.wait_for(
                lambda: all(not self._is_full(f) for f in followers) or any(f.is_lost for f in followers), timeout_s
            )
            for follower in followers:
                if follower.is_lost:
                    raise LostReader(follower.name, f"the stream of step plans to {follower.name} is broken")
            for follower in followers:
                if self._is_full(follower):
                    queued = f"{self._max_queued} step plans are queued for it, and none was taken within {timeout_s:g} s"
                    raise SlowReader(follower.name, f"{follower.name} is slow: {queued}")
            for follower in followers:
                follower.messages.append(message)
            self._changed.notify_all()

    def close(self, timeout_s: float = 5.0) -> None:
        """Followers get what was sent, as far as they take it in this time, then ChannelClosed."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            waiting = [follower for follower in self._followers.values() if follower.is_here]
            self._changed.wait_for(lambda: all(f.is_lost or not self._num_queued(f) for f in waiting), timeout_s)
        self._server.stop(grace=_STOP_CHECK_S).wait(timeout_s)

    def Follow(self, request: worker_pb2.FollowRequest, context: grpc.ServicerContext) -> Iterator[worker_pb2.PlanMessage]:
        follower = self._enter(request, context)
        context.send_initial_metadata(((_ACCEPTED, "1"),))
        # gRPC asks for the next message when it has sent the last.
        while (message := self._next(follower)) is not None:
            yield worker_pb2.PlanMessage(plan=message)

    def _enter(self, request: worker_pb2.FollowRequest, context: grpc.ServicerContext) -> _Follower:
        if request.epoch != self._epoch:
            problem = f"this leader belongs to epoch {self._epoch}, not {request.epoch}"
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, problem)
        if (name := peer_name(context)).rpartition(".")[0] != self._identity.name.rpartition(".")[0]:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, f"{name!r} is no rank of {self._identity.name!r}")
        follower = self._followers.get(request.follower)
        if follower is None:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"this leader has no rank {request.follower!r} on another node")
        assert follower is not None, "abort raises"
        with self._changed:
            was_here, follower.is_here = follower.is_here, True
            self._changed.notify_all()
        if was_here:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{request.follower} follows, or has followed, in this epoch")
        if not context.add_callback(lambda: self._lose(follower)):
            self._lose(follower)
        return follower

    def _lose(self, follower: _Follower) -> None:
        with self._changed:
            follower.is_lost = True
            self._changed.notify_all()

    def _next(self, follower: _Follower) -> bytes | None:
        """The follower's next message; None when there will be none."""
        with self._changed:
            follower.in_write = False
            self._changed.notify_all()
            while not (follower.messages or follower.is_lost or self._is_closed):
                self._changed.wait(_STOP_CHECK_S)
            if follower.is_lost or not follower.messages:
                return None
            follower.in_write = True
            return follower.messages.popleft()

    def _is_full(self, follower: _Follower) -> bool:
        return self._num_queued(follower) >= self._max_queued

    def _num_queued(self, follower: _Follower) -> int:
        return len(follower.messages) + follower.in_write


class PlanFollower:
    """A rank's end."""

    def __init__(
        self,
        address: str,
        *,
        epoch: int,
        follower: str,
        leader: str,
        identity: Identity,
        timeout_s: float,
        max_queued: int = 32,
    ) -> None:
        """Connects and is accepted, both within `timeout_s`. At most `max_queued` messages are read ahead.

        Args:
            leader: the name in the leader's certificate.

        Raises:
            ChannelClosed: nobody answers there, or not as this cluster's leader.
            InternalError: the leader refuses: another epoch, an unknown name, or one that was there already.
        """
        self._queue: queue.Queue[bytes | None] = queue.Queue(max_queued)  # None: the end
        self._ended: InternalError | None = None
        self._is_accepted = False
        self._answered = threading.Event()
        self._closing = threading.Event()
        options = [*_OPTIONS, *channel_options(leader)]
        self._channel = grpc.secure_channel(address, channel_credentials(identity), options=options)
        request = worker_pb2.FollowRequest(epoch=epoch, follower=follower)
        self._call = worker_pb2_grpc.PlanStreamStub(self._channel).Follow(request)  # the leader listens already
        self._thread = threading.Thread(target=self._read, name="plan-follower", daemon=True)
        self._thread.start()
        if self._answered.wait(timeout_s) and self._is_accepted:
            return
        problem = self._ended or ChannelClosed(f"the leader at {address} did not answer within {timeout_s:g} s")
        self.close()
        raise problem

    def receive(self, timeout_s: float) -> bytes | None:
        """The next message, or None if there is none within `timeout_s`.

        Raises:
            ChannelClosed: there will be none: the leader has closed, or the stream is broken.
        """
        if self._ended is None or not self._queue.empty():
            try:
                message = self._queue.get(timeout=timeout_s) if timeout_s > 0 else self._queue.get_nowait()
            except queue.Empty:
                return None
            if message is not None:
                return message
        assert self._ended is not None, "the end comes after its reason"
        raise self._ended

    def close(self) -> None:
        self._closing.set()
        self._call.cancel()
        self._channel.close()
        self._thread.join(2 * _STOP_CHECK_S)

    def _read(self) -> None:
        ended: InternalError = ChannelClosed("the leader has closed the stream of step plans")
        try:
            if any(key == _ACCEPTED for key, _ in self._call.initial_metadata() or ()):
                self._is_accepted = True
                self._answered.set()
            for message in self._call:
                self._put(message.plan)
        except grpc.RpcError as error:
            ended = _error_of(error)
        self._ended = ended
        self._answered.set()
        self._put(None)

    def _put(self, message: bytes | None) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(message, timeout=_STOP_CHECK_S)
                return


def _error_of(error: grpc.RpcError) -> InternalError:
    code = error.code() if isinstance(error, grpc.Call) else None
    details = error.details() if isinstance(error, grpc.Call) else str(error)
    if code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED):
        return InternalError(f"the leader does not take this rank: {details}")
    return ChannelClosed(f"the stream of step plans broke: {explain(details)}")
