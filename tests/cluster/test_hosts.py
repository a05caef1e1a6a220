"""Two ranks on two hosts: what is served, and what happens when the hosts lose each other.

The tests share one cluster and run in this order; each leaves it serving, and the last ends it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise

import pytest
from ray_hosts import PROMPT, Events, RayHosts

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(400)]

NUM_TOKENS = 400
LOST_WITHIN_S = 20.0  # it takes 10, and other tests run on this machine


def test_ray_up_serves_two_ranks_on_two_hosts(cluster: RayHosts, expected: tuple[str, list[int]]) -> None:
    assert cluster.ranks() == {"one": 1, "two": 1}
    done = cluster.client("stream", PROMPT, "300").finish(60)
    assert done["token_ids"] == expected[1][:300]
    assert expected[0].startswith(done["text"].rstrip("\ufffd"))
    assert "replica-0: ready" in cluster.pilotfish("status")
    assert "serves a model already" in cluster.pilotfish("up", "/tmp/shared/tiny", check=False)


def test_ranks_that_lose_each_other_go_on_on_one_host(cluster: RayHosts, expected: tuple[str, list[int]]) -> None:
    """Ray sees nothing of this: both hosts reach the head, and it would place them there again."""
    stream = Stream(cluster)
    cluster.network.cut_between("one", "two")
    lost = stream.wait_lost()
    assert "replica-0" in lost
    assert "rank 1 on 10.213.7." in lost
    assert "has been silent" in lost
    stream.finish(expected)
    cluster.network.heal()
    assert list(cluster.ranks().values()) == [2]


def test_a_host_that_is_cut_off_is_replaced_at_once(cluster: RayHosts, expected: tuple[str, list[int]]) -> None:
    stream = Stream(cluster)
    (home,) = cluster.ranks()
    cluster.network.cut_off(home)
    try:
        assert "replica-0" in stream.wait_lost()
        stream.wait_ready()
        assert cluster.ranks()[other_than(home)] == 2
    finally:
        cluster.network.heal()  # before Ray gives the host up, which would cost the next test half a minute
    stream.finish(expected)
    cluster.wait_for_nodes(3)
    wait_until(lambda: list(cluster.ranks()) == [other_than(home)], "the end of the ranks that were cut off", 60)


def test_a_killed_host_is_replaced(cluster: RayHosts, expected: tuple[str, list[int]]) -> None:
    stream = Stream(cluster)
    (home,) = cluster.ranks()
    cluster.network.hosts[home].kill()
    stream.wait_lost()
    stream.finish(expected)
    assert cluster.ranks() == {other_than(home): 2}


def test_down_leaves_nothing(cluster: RayHosts) -> None:
    """`pilotfish down` ends all of its own; `ray down` ends Ray on the head, and the workers see that it is gone."""
    assert "Ended" in cluster.pilotfish("down")
    wait_until(lambda: not cluster.ranks(), "the ranks' end", 30)
    assert "Nothing is served" in cluster.pilotfish("down")
    assert cluster.named_actors() == []
    cluster.down()
    wait_until(lambda: not cluster.ray_processes(), "the raylets' end", 60)


def other_than(host: str) -> str:
    return {"one": "two", "two": "one"}[host]


class Stream:
    """A client's stream that has begun, and a client that watches the replica's state."""

    def __init__(self, cluster: RayHosts) -> None:
        self._watch = cluster.client("watch")
        wait_until(lambda: self._watch.events, "the cluster's status", 60)
        self._stream = cluster.client("stream", PROMPT, str(NUM_TOKENS))
        wait_until(lambda: self._stream.num_tokens > 100, "the first tokens", 60)
        self._start = time.monotonic()

    def wait_lost(self) -> str:
        """What is said of the loss, which must be found soon. It has hit the stream in its midst."""
        assert self._stream.num_tokens < NUM_TOKENS
        events = self._watch.events
        wait_until(lambda: len(events) > 1, "the loss to be found", LOST_WITHIN_S)
        wait_until(lambda: events[-1]["replicas"][0][2], "the reason", 5)
        return str(events[-1]["replicas"][0])

    def wait_ready(self) -> None:
        wait_until(lambda: self._watch.events[-1]["replicas"][0][1] == "ready", "the replica to be ready again", 90)

    def finish(self, expected: tuple[str, list[int]]) -> None:
        """To the last token, none lost and none repeated."""
        done = self._stream.finish(100)
        print(f"the stream went on and ended after {time.monotonic() - self._start:.1f} s: {_pauses(self._stream)}")
        self._watch.stop()
        assert done["token_ids"] == expected[1][:NUM_TOKENS]
        assert done["usage"]["completion_tokens"] == NUM_TOKENS


def _pauses(stream: Events) -> str:
    times = [event["at"] for event in stream.events]
    return f"longest pause {max(after - before for before, after in pairwise(times)):.1f} s"


def wait_until(condition: Callable[[], object], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.1)
