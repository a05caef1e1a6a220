"""Ctrl-C at any moment: handled at the end of what must not be cut in half, and nothing is left locked or running."""

from __future__ import annotations

import os
import queue
import random
import signal
import threading
import time

import pytest
from pilotfish import Pipeline, SamplingParams
from pilotfish.workers.interrupts import Uninterrupted


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_it_is_handled_at_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - the block's end raises
        with Uninterrupted(lambda: done.append("told")):
            interrupt()
            time.sleep(0.01)
            done.append("went on")
        done.append("not reached")
    assert done == ["told", "went on"]
    with pytest.raises(KeyboardInterrupt):  # as before
        interrupt()


def test_a_wait_is_ended_by_it():
    messages: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Timer(0.1, interrupt).start()
    with pytest.raises(KeyboardInterrupt), Uninterrupted(lambda: messages.put("interrupted")):
        assert messages.get(timeout=60) == "interrupted"


def test_other_threads_are_left_alone():
    results = []
    thread = threading.Thread(target=lambda: results.append(Uninterrupted().__enter__()))
    thread.start()
    thread.join(60)
    assert len(results) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_pipeline_that_is_interrupted_again_and_again_stops_its_work_each_time(tiny_llama):
    rng = random.Random(3)
    params = SamplingParams(temperature=0.0, max_tokens=450)
    with Pipeline(str(tiny_llama), device="cpu", num_kv_blocks=128, max_num_seqs=4, num_threads=1) as pipeline:
        for _ in range(60):
            timer = threading.Timer(rng.random() ** 2 * 0.02, interrupt)
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012 - whenever it comes
                timer.start()
                while True:
                    pipeline(["abc"] * 50, params)
            deadline_s = time.monotonic() + 60
            while pipeline._engine._live:
                assert time.monotonic() < deadline_s, pipeline._engine.health()
                time.sleep(0.001)
