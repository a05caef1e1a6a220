"""The engine's thread: what goes in, what comes out, deadlines, failures, and its end."""

from __future__ import annotations

import math
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from pilotfish.common.config import EngineConfig, ModelConfig
from pilotfish.common.errors import ConfigError, InvalidRequest, ModelNotFound, Overloaded, Unavailable
from pilotfish.common.requests import BlockStored, FinishReason
from pilotfish.common.tenants import Tenant
from pilotfish.workers import engine as engine_module
from pilotfish.workers.engine import Engine, Phase
from pilotfish.workers.timed_runner import TimedReplica, TimedRunner, TimingModel

TIMEOUT_S = 60.0


class Waiting:
    """Lets a test wait for what an engine reports; `on_step` may be held up to stall the engine."""

    def __init__(self, collector) -> None:
        self.collector = collector
        self.changed = threading.Condition()
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def __call__(self, step) -> None:
        with self.changed:
            self.collector(step)
            self.changed.notify_all()
        assert self.may_go_on.wait(TIMEOUT_S)

    def until(self, condition) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: condition(self.collector), TIMEOUT_S)

    def until_ended(self, *names: str) -> None:
        self.until(lambda collector: all(name in collector.ended for name in names))


@pytest.fixture
def outputs(collector):
    return Waiting(collector)


@pytest.fixture
def start(tiny_llama, outputs):
    engines = []

    def start(**options) -> Engine:
        config = EngineConfig(**{"device": "cpu", "num_kv_blocks": 128, "max_num_seqs": 8, "num_threads": 1, **options})
        engine = Engine(ModelConfig(model=str(tiny_llama), served_name="tiny"), config, on_step=outputs)
        engines.append(engine)
        engine.info = engine.start()
        return engine

    yield start
    outputs.may_go_on.set()
    for engine in engines:
        engine.stop()


def until(condition) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


def test_the_start_reports_what_was_found(start, tiny_llama):
    engine = start()
    info = engine.info
    assert (info.model_name, info.model_path, info.architecture) == ("tiny", str(tiny_llama), "LlamaForCausalLM")
    assert (info.vocab_size, info.max_model_len, info.device, info.dtype) == (320, 512, "cpu", "float32")
    assert info.kv_cache_bytes == 129 * 16 * 2 * 2 * (2 * 16) * 4
    assert (info.num_blocks, info.max_num_seqs) == (128, 8)
    assert list(info.kernels) == ["cpu"]
    health = engine.health()
    assert (health.ok, health.phase, health.step_age_s) == (True, Phase.IDLE, 0.0)


def test_the_cache_is_sized_from_measured_memory(start):
    info = start(num_kv_blocks=None, max_num_batched_tokens=512).info
    assert info.num_blocks == 8 * 512 // 16  # there is room for all that this tiny model can use


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": "no-such-model-anywhere"}, ModelNotFound, "no-such-model-anywhere"),
        ({"max_model_len": 100_000}, ConfigError, r"max_model_len must be in \[2, 512\]"),
        ({"kv_memory_fraction": 1e-12}, ConfigError, "Raise kv_memory_fraction"),
    ],
)
def test_an_engine_that_cannot_start_says_why(tiny_llama, options, error, message):
    model = ModelConfig(model=options.get("model", str(tiny_llama)), max_model_len=options.get("max_model_len"))
    fraction = options.get("kv_memory_fraction", 0.5)
    config = EngineConfig(device="cpu", num_threads=1, kv_memory_fraction=fraction, max_num_batched_tokens=64)
    engine = Engine(model, config, on_step=print)
    with pytest.raises(error, match=message):
        engine.start()
    health = engine.health()
    assert (health.ok, health.phase) == (False, Phase.FAILED)
    assert health.message
    engine.stop()


def test_requests_from_many_threads_are_all_answered(start, outputs, make_request):
    engine = start()
    rng = random.Random(2)
    requests = [make_request(f"r{i}", [rng.randrange(256) for _ in range(rng.randint(1, 60))]) for i in range(60)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(engine.submit, requests))
    outputs.until_ended(*(request.request_id for request in requests))
    assert all(len(outputs.collector.tokens[request.request_id]) == 16 for request in requests)
    until(lambda: engine.health().phase is Phase.IDLE)


def test_what_arrives_while_a_step_runs_is_in_the_step_after_it(outputs, make_request, monkeypatch):
    """Of two steps in flight the first has ended: the second runs, and the third is planned shortly before its end."""
    for name, value_s in (("_LONGEST_STEP_S", 1.0), ("_ARRIVALS_S", 60.0)):  # steps are long here: nobody else's load matters
        monkeypatch.setattr(f"pilotfish.workers.step_loop.{name}", value_s)
    plans = []

    class Runner(TimedRunner):
        def launch(self, plan):
            plans.append(plan)
            return super().launch(plan)

    def set_up(model_config, engine_config):
        _, info = TimedReplica()(model_config, engine_config)
        return Runner(TimingModel(decode_ms=((1, 300.0), (2, 300.0)), prefill_ms_per_token=0.0)), info

    config = EngineConfig(device="cpu", num_kv_blocks=128, max_num_seqs=8)
    engine = Engine(ModelConfig(model="timed"), config, on_step=outputs, max_steps_in_flight=2, set_up=set_up)
    engine.start()
    try:
        engine.submit(make_request("a", [1, 2, 3], max_tokens=6))
        outputs.until(lambda collector: len(collector.steps) == 4)  # the fifth runs
        time.sleep(0.05)
        engine.submit(make_request("b", [4, 5, 6], max_tokens=1))
        outputs.until_ended("a", "b")
    finally:
        engine.stop()
    (admitting,) = (plan for plan in plans if any(admitted.request.request_id == "b" for admitted in plan.admitted))
    assert admitting.step_id == 6


def test_an_abort_frees_blocks_and_slots_within_two_steps(start, outputs, make_request):
    engine = start(prefix_caching=False)
    engine.submit(make_request("long", [1] * 100, max_tokens=400))
    outputs.until(lambda collector: len(collector.tokens.get("long", ())) >= 3)
    outputs.may_go_on.clear()
    outputs.until(lambda collector: collector.steps[-1].load.num_used_blocks > 0)
    assert engine.abort("long") is True
    num_steps = len(outputs.collector.steps)
    outputs.may_go_on.set()
    outputs.until_ended("long")
    assert outputs.collector.reason("long") is FinishReason.ABORT
    last = outputs.collector.steps[-1]
    assert last.step_id <= num_steps + 2
    assert (last.load.num_used_blocks, last.load.num_running) == (0, 0)
    until(lambda: engine.abort("long") is False)


def test_an_abort_of_a_waiting_request_is_answered(start, outputs, make_request):
    engine = start(max_num_seqs=1)
    outputs.may_go_on.clear()
    engine.submit(make_request("running", [1, 2]))
    engine.submit(make_request("waiting", [1, 2]))
    engine.abort("waiting")
    outputs.may_go_on.set()
    outputs.until_ended("running", "waiting")
    assert outputs.collector.reason("waiting") is FinishReason.ABORT
    assert outputs.collector.tokens["waiting"] == []
    assert outputs.collector.reason("running") is FinishReason.LENGTH


def test_a_deadline_ends_running_and_waiting_requests(start, outputs, make_request):
    engine = start(max_num_seqs=1)
    outputs.may_go_on.clear()
    engine.submit(make_request("running", [1, 2], max_tokens=500, deadline_ms=40.0))
    engine.submit(make_request("waiting", [1, 2], deadline_ms=40.0))
    engine.submit(make_request("patient", [1, 2], max_tokens=5, deadline_ms=TIMEOUT_S * 1e3))
    time.sleep(0.05)
    outputs.may_go_on.set()
    outputs.until_ended("running", "waiting", "patient")
    reasons = [outputs.collector.reason(name) for name in ("running", "waiting", "patient")]
    assert reasons == [FinishReason.DEADLINE, FinishReason.DEADLINE, FinishReason.LENGTH]


def test_submit_and_health_do_not_wait_for_a_stalled_step(start, outputs, make_request):
    engine = start(stall_timeout_s=0.02)
    outputs.may_go_on.clear()
    engine.submit(make_request("a", [1, 2]))
    outputs.until(lambda collector: collector.steps)
    engine.submit(make_request("b", [1, 2]))
    assert engine.abort("b") is True
    assert "b" not in outputs.collector.tokens
    outputs.may_go_on.set()
    outputs.until_ended("a", "b")


def test_a_stalled_step_is_unhealthy_and_recovers(start, outputs, make_request, monkeypatch):
    engine = start(stall_timeout_s=0.05)
    in_step, may_end = threading.Event(), threading.Event()
    forward = engine._loop._runner.model.forward

    def slow_forward(batch):
        in_step.set()
        assert may_end.wait(TIMEOUT_S)
        return forward(batch)

    monkeypatch.setattr(engine._loop._runner.model, "forward", slow_forward)
    engine.submit(make_request("a", [1, 2], max_tokens=1))
    assert in_step.wait(TIMEOUT_S)
    until(lambda: engine.health().step_age_s > 0.05)
    health = engine.health()
    assert (health.ok, health.phase) == (False, Phase.STEP)
    assert "a step has been running" in health.message
    with pytest.raises(Unavailable, match="no snapshot within"):
        engine.snapshot(timeout_s=0.01)
    may_end.set()
    outputs.until_ended("a")
    until(lambda: engine.health().phase is Phase.IDLE)
    assert engine.health().ok


def test_too_many_requests_are_refused_at_once(start, outputs, make_request, monkeypatch):
    monkeypatch.setattr(engine_module, "MAX_LIVE_REQUESTS", 3)
    engine = start()
    outputs.may_go_on.clear()
    for name in ("a", "b", "c"):
        engine.submit(make_request(name, [1, 2]))
    with pytest.raises(Overloaded) as refused:
        engine.submit(make_request("d", [1, 2]))
    assert refused.value.retry_after_s > 0
    outputs.may_go_on.set()
    outputs.until_ended("a", "b", "c")
    until(lambda: not engine._live)
    engine.submit(make_request("d", [1, 2]))
    outputs.until_ended("d")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": [1] * 512}, "512 tokens leave no room"),
        ({"prompt": [1, 320]}, "prompt_token_ids has the token id 320"),
        ({"prompt": [1, -1]}, "prompt_token_ids has the token id -1"),
        ({"outputs": (999,)}, "output_token_ids has the token id 999"),
        ({"outputs": (1, 2, 3), "max_tokens": 2}, "more than max_tokens"),
        ({"logit_bias": {400: 1.0}}, "logit_bias has the token id 400"),
        ({"end_token_ids": (320,)}, "end_token_ids has the token id 320"),
        ({"bad_words_ids": ((1, 321),)}, "bad_words_ids has the token id 321"),
        ({"bad_words_ids": ((),)}, "empty word"),
        ({"deadline_ms": math.nan}, "deadline_ms is not a number"),
        ({"tenant": Tenant("x", math.nan)}, "tenant_weight must be above 0 and finite, not nan"),
        ({"tenant": Tenant("x", -1.0)}, "tenant_weight must be above 0"),
    ],
)
def test_what_cannot_run_is_refused(running_engine, make_request, values, message):
    with pytest.raises(InvalidRequest, match=message):
        running_engine.submit(make_request("a", **{"prompt": [1, 2], **values}))


@pytest.fixture(scope="module")
def running_engine(tiny_llama):
    config = EngineConfig(device="cpu", num_kv_blocks=64, max_num_seqs=4, num_threads=1)
    engine = Engine(ModelConfig(model=str(tiny_llama)), config, on_step=lambda step: None)
    engine.start()
    yield engine
    engine.stop()


def test_an_id_in_use_is_refused_and_free_again_afterwards(start, outputs, make_request):
    engine = start()
    outputs.may_go_on.clear()
    engine.submit(make_request("a", [1, 2], max_tokens=2))
    with pytest.raises(InvalidRequest, match="'a' is in use"):
        engine.submit(make_request("a", [3]))
    outputs.may_go_on.set()
    outputs.until_ended("a")
    until(lambda: not engine._live)
    outputs.collector.ended.clear()
    outputs.collector.tokens.clear()
    engine.submit(make_request("a", [1, 2], max_tokens=2))
    outputs.until_ended("a")


def test_a_replay_that_is_complete_ends_at_once(start, outputs, make_request):
    engine = start()
    engine.submit(make_request("full", [1, 2], outputs=(3, 4), max_tokens=2))
    engine.submit(make_request("stopped", [1, 2], outputs=(3, 9), end_token_ids=(9,)))
    outputs.until_ended("full", "stopped")
    assert outputs.collector.reason("full") is FinishReason.LENGTH
    assert outputs.collector.reason("stopped") is FinishReason.STOP


def test_a_sequence_that_outgrows_the_cache_ends_with_the_reason(start, outputs, make_request):
    engine = start(num_kv_blocks=2)
    engine.submit(make_request("a", [1] * 20, max_tokens=100))
    outputs.until_ended("a")
    assert outputs.collector.reason("a") is FinishReason.ERROR
    assert "num_kv_blocks" in outputs.collector.ended["a"].error
    assert len(outputs.collector.tokens["a"]) == 32 - 20 + 1


def test_the_snapshot_agrees_with_the_steps(start, outputs, make_request):
    engine = start()
    engine.submit(make_request("a", list(range(50)), max_tokens=2))
    outputs.until_ended("a")
    outputs.may_go_on.clear()
    engine.submit(make_request("b", [5, 6], max_tokens=400))
    outputs.until(lambda collector: "b" in collector.tokens)
    outputs.may_go_on.set()
    snapshot = engine.snapshot()
    engine.abort("b")
    steps = [step for step in outputs.collector.steps if step.step_id <= snapshot.step_id]
    stored = [event for step in steps for event in step.kv_events]
    assert all(isinstance(event, BlockStored) for event in stored)
    assert set(snapshot.scheduler.blocks) == set(stored)
    assert snapshot.scheduler.next_event_id == steps[-1].first_event_id + len(steps[-1].kv_events)
    (running,) = snapshot.scheduler.requests
    assert (running.request_id, running.num_prompt_tokens) == ("b", 2)
    assert running.num_output_tokens == sum(len(o.token_ids) for s in steps for o in s.sequences if o.request_id == "b")


def test_a_drain_refuses_new_requests_and_finishes_the_old(start, outputs, make_request):
    engine = start()
    outputs.may_go_on.clear()
    engine.submit(make_request("a", [1, 2], max_tokens=5))
    assert engine.drain(timeout_s=0.01) == 1
    with pytest.raises(Unavailable, match="draining"):
        engine.submit(make_request("b", [1, 2]))
    outputs.may_go_on.set()
    assert engine.drain(timeout_s=TIMEOUT_S) == 0
    assert outputs.collector.reason("a") is FinishReason.LENGTH


def test_a_stop_ends_what_is_running(start, outputs, make_request):
    engine = start(max_num_seqs=2)
    for name in ("a", "b", "c"):
        engine.submit(make_request(name, [1, 2], max_tokens=500))
    outputs.until(lambda collector: "a" in collector.tokens)
    engine.stop()
    assert {outputs.collector.reason(name) for name in ("a", "b", "c")} == {FinishReason.ABORT}
    assert (engine.health().ok, engine.health().phase) == (False, Phase.STOPPED)
    with pytest.raises(Unavailable):
        engine.submit(make_request("d", [1, 2]))
    with pytest.raises(Unavailable):
        engine.snapshot(timeout_s=TIMEOUT_S)
    engine.stop()


def test_a_broken_engine_says_so_and_takes_nothing(tiny_llama, make_request):
    def on_step(step):
        raise RuntimeError("the reader is gone")

    config = EngineConfig(device="cpu", num_kv_blocks=64, num_threads=1)
    engine = Engine(ModelConfig(model=str(tiny_llama)), config, on_step=on_step)
    engine.start()
    engine.submit(make_request("a", [1, 2]))
    until(lambda: engine.health().phase is Phase.FAILED)
    assert engine.health().message == "RuntimeError: the reader is gone"
    assert engine.drain(timeout_s=TIMEOUT_S) == 1
    with pytest.raises(Unavailable, match="has failed"):
        engine.submit(make_request("b", [1, 2]))
    engine.stop()
