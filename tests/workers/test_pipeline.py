"""The in-process Pipeline on the tiny random model: kinds of prompts, errors by item, streams, interruption, the end."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from pilotfish import Pipeline, SamplingParams
from pilotfish.common.errors import ConfigError, InternalError, InvalidRequest, ModelNotFound, Unavailable
from pilotfish.common.requests import FinishReason
from pilotfish.workers.completion import Completion
from processes import children_end

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
SMALL = {"device": "cpu", "num_kv_blocks": 128, "max_num_seqs": 4, "num_threads": 1}


@pytest.fixture(scope="module")
def pipeline(tiny_llama):
    with Pipeline(str(tiny_llama), **SMALL) as pipeline:
        yield pipeline


def until(condition) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


def test_a_string_gives_a_completion(pipeline):
    completion = pipeline("hello there", GREEDY)
    assert isinstance(completion, Completion)
    assert len(completion.token_ids) == 8
    assert completion.text == pipeline.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    assert (completion.finish_reason, completion.error, completion.logprobs) == (FinishReason.LENGTH, None, ())
    assert completion.prompt_tokens == len("hello there")


def test_all_kinds_of_prompts_agree(pipeline):
    text = "Say hi"
    messages = [{"role": "user", "content": text}]
    template = "<|start|>user\nSay hi<|end|><|start|>assistant\n"
    by_text = pipeline(text, GREEDY)
    assert pipeline(pipeline.tokenizer.encode(text), GREEDY).token_ids == by_text.token_ids
    by_chat = pipeline(messages, GREEDY)
    assert by_chat.token_ids == pipeline(pipeline.tokenizer.encode(template), GREEDY).token_ids != by_text.token_ids
    listed = pipeline([text, pipeline.tokenizer.encode(text), messages, text], GREEDY)
    assert [item.token_ids for item in listed] == [by_text.token_ids] * 2 + [by_chat.token_ids, by_text.token_ids]
    assert listed[3].cached_tokens == 0  # six tokens fill no block
    assert pipeline([], GREEDY) == []
    assert [item.token_ids for item in pipeline([text], GREEDY)] == [by_text.token_ids]


def test_a_long_list_keeps_its_order_and_shares_prefixes(pipeline):
    prompts = [f"{'the same beginning of every prompt ' * 2}{number}" for number in range(40)]
    together = pipeline(prompts, GREEDY)
    assert [item.text for item in together[::9]] == [pipeline(prompt, GREEDY).text for prompt in prompts[::9]]
    assert max(item.cached_tokens for item in together) >= 64


def test_each_prompt_may_have_its_own_parameters(pipeline):
    params = [SamplingParams(temperature=0.0, max_tokens=n + 1) for n in range(5)]
    assert [len(item.token_ids) for item in pipeline(["abc"] * 5, params)] == [1, 2, 3, 4, 5]
    with pytest.raises(InvalidRequest, match="5 sampling parameters for 2 prompts"):
        pipeline(["a", "b"], params)
    with pytest.raises(InvalidRequest, match="one prompt takes one"):
        pipeline("a", params)


def test_parameters_by_name_leave_the_rest_to_the_defaults(pipeline):
    assert pipeline("abc", {"temperature": 0.0, "max_tokens": 3}).token_ids == pipeline("abc", GREEDY).token_ids[:3]
    wrong = pipeline("abc", {"temprature": 1})
    assert "did you mean 'temperature'" in str(wrong.error)


def test_the_error_of_one_item_does_not_fail_the_others(pipeline):
    ok = pipeline("abc", GREEDY)
    results = pipeline(["abc", "", [1, 9999], None, "x" * 600, [{"role": "user"}], "abc", []], GREEDY)
    assert [item.text for item in (results[0], results[6])] == [ok.text] * 2
    failed = [results[index] for index in (1, 2, 3, 4, 5, 7)]
    assert all(isinstance(item.error, InvalidRequest) for item in failed)
    assert all((item.text, item.token_ids, item.finish_reason) == ("", (), FinishReason.ERROR) for item in failed)
    assert "empty" in str(results[1].error)
    assert "9999" in str(results[2].error)
    assert "600" in str(results[4].error)
    assert isinstance(pipeline("", GREEDY).error, InvalidRequest)
    for prompts in (42, None, {"role": "user"}):
        with pytest.raises(InvalidRequest, match="a prompt is text"):
            pipeline(prompts, GREEDY)


def test_a_failure_in_the_engine_is_the_error_of_its_item(pipeline, monkeypatch):
    model = pipeline._engine._loop._runner.model
    forward = model.forward

    def fail_on_200(batch):
        if 200 in batch.token_ids_T:
            raise ValueError("no two hundreds")
        return forward(batch)

    greedy = SamplingParams(temperature=0.0, max_tokens=2)
    expected = pipeline([[1, 2], [3, 4]], greedy)
    monkeypatch.setattr(model, "forward", fail_on_200)
    first, bad, last = pipeline([[1, 2], [1, 200], [3, 4]], greedy)
    assert [first.token_ids, last.token_ids] == [item.token_ids for item in expected]
    assert isinstance(bad.error, InternalError)
    assert "no two hundreds" in str(bad.error)
    with pytest.raises(InternalError, match="no two hundreds"):
        list(pipeline.stream([1, 200], greedy))


def test_n_choices_differ_and_are_reproducible(pipeline):
    params = SamplingParams(temperature=1.5, seed=3, n=3, max_tokens=6)
    completion = pipeline("abc", params)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert len({choice.token_ids for choice in completion.choices}) == 3
    assert pipeline("abc", params).choices == completion.choices
    assert completion.token_ids == completion.choices[0].token_ids
    assert pipeline("abc", SamplingParams(temperature=1.5, seed=3, max_tokens=6)).token_ids == completion.token_ids


def test_a_stop_string_ends_the_text_and_the_engines_work(pipeline):
    whole = pipeline("abc", SamplingParams(temperature=0.0, max_tokens=60))
    pairs = [whole.text[start : start + 2] for start in range(4, 40)]
    stop = next(pair for start, pair in enumerate(pairs, 4) if pair.isascii() and whole.text.index(pair) == start)
    stopped = pipeline("abc", SamplingParams(temperature=0.0, max_tokens=60, stop=(stop,)))
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert (stopped.finish_reason, stopped.choices[0].stop_reason) == (FinishReason.STOP, stop)
    assert len(stopped.token_ids) < 60
    kept = SamplingParams(temperature=0.0, max_tokens=60, stop=(stop,), include_stop_str_in_output=True)
    assert pipeline("abc", kept).text == stopped.text + stop
    until(lambda: not pipeline._engine._live)


def test_logprobs_come_with_the_tokens(pipeline):
    completion = pipeline("abc", SamplingParams(temperature=0.0, max_tokens=5, logprobs=2))
    assert [entry.token_id for entry in completion.logprobs] == list(completion.token_ids)
    assert all(len(entry.top) == 2 and entry.rank == 1 for entry in completion.logprobs)


def test_a_stream_adds_up_to_the_completion(pipeline):
    params = SamplingParams(temperature=1.0, seed=5, n=2, max_tokens=20)
    deltas = list(pipeline.stream("abc", params))
    for choice in pipeline("abc", params).choices:
        own = [delta for delta in deltas if delta.index == choice.index]
        assert len(own) > 10
        assert "".join(delta.text for delta in own) == choice.text
        assert tuple(token for delta in own for token in delta.token_ids) == choice.token_ids
        assert [delta.finish_reason for delta in own] == [None] * (len(own) - 1) + [choice.finish_reason]


def test_a_stream_refuses_at_once_and_is_aborted_when_left(pipeline):
    with pytest.raises(InvalidRequest, match="empty"):
        pipeline.stream("")
    with pytest.raises(InvalidRequest, match="one prompt"):
        pipeline.stream(["a", "b"])
    stream = pipeline.stream("abc", SamplingParams(temperature=0.0, max_tokens=400))
    next(stream)
    assert pipeline._engine._live
    stream.close()
    until(lambda: not pipeline._engine._live)


def test_calls_from_threads_share_the_engine(pipeline):
    expected = [pipeline(f"prompt {i}", GREEDY).text for i in range(6)]
    results: dict[int, list[str]] = {}

    def work(i: int) -> None:
        results[i] = [item.text for item in pipeline([f"prompt {i}"] * 5, GREEDY)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {i: [expected[i]] * 5 for i in range(6)}


def test_a_progress_bar_is_shown_where_asked_for(pipeline, capsys):
    pipeline(["a", "b", ""], GREEDY, progress=True)
    assert "3/3" in capsys.readouterr().err
    pipeline(["a", "b"], GREEDY)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seq": 3}, "did you mean 'max_num_seqs'"),
        ({"dtyp": "float32"}, "did you mean 'dtype'"),
        ({"max_num_seqs": "many"}, "max_num_seqs must be int"),
        ({"dtype": "int3"}, "dtype must be one of"),
        ({"dtype": "bfloat16", "device": "cpu"}, "bfloat16"),
    ],
)
def test_a_wrong_option_is_named(tiny_llama, options, message):
    with pytest.raises(ConfigError, match=message):
        Pipeline(str(tiny_llama), **options)


def test_an_unknown_model_says_what_was_tried():
    with pytest.raises(ModelNotFound, match="Tried"):
        Pipeline("no such model")


def test_the_models_own_defaults_apply_where_asked_for(tiny_llama):
    with Pipeline(str(tiny_llama), generation_config="model", **SMALL) as pipeline:
        # Its generation_config.json does not say do_sample: greedy.
        assert pipeline("abc", {"max_tokens": 8}).token_ids == pipeline("abc", GREEDY).token_ids


def test_ranks_on_this_machine_complete_alike(pipeline, tiny_llama):
    prompts = ["hello there", "and now?"]
    with Pipeline(str(tiny_llama), tensor_parallel=2, **SMALL) as ranks:
        texts = [completion.token_ids for completion in ranks(prompts, GREEDY)]
    assert texts == [completion.token_ids for completion in pipeline(prompts, GREEDY)]
    assert children_end()


def test_a_closed_pipeline_refuses_and_closing_twice_is_fine(tiny_llama):
    pipeline = Pipeline(str(tiny_llama), **SMALL)
    stream = pipeline.stream("abc", SamplingParams(temperature=0.0, max_tokens=400))
    next(stream)
    pipeline.close()
    pipeline.close()
    assert [delta.finish_reason for delta in stream][-1] is FinishReason.ABORT
    for call in (pipeline, pipeline.stream):
        with pytest.raises(Unavailable, match="closed"):
            call("abc")


def test_a_forgotten_pipeline_stops_its_engine(tiny_llama):
    pipeline = Pipeline(str(tiny_llama), **SMALL)
    thread = pipeline._engine._thread
    assert thread.is_alive()
    del pipeline
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_an_engine_that_fails_gives_the_open_items_an_error(tiny_llama, monkeypatch):
    pipeline = Pipeline(str(tiny_llama), **SMALL)
    loop = pipeline._engine._loop
    plan, num_plans = loop.scheduler.plan, 0

    def fail_later():
        nonlocal num_plans
        num_plans += 1
        if num_plans > 6:
            raise AssertionError("a broken invariant")
        return plan()

    monkeypatch.setattr(loop.scheduler, "plan", fail_later)
    short, long = pipeline(["abc", "def"], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=100)])
    assert short.error is None
    assert isinstance(long.error, InternalError)
    assert "a broken invariant" in str(long.error)
    pipeline.close()


INTERRUPTED = """
import sys
import time
from pilotfish import Pipeline, SamplingParams
pipeline = Pipeline(sys.argv[1], device="cpu", num_kv_blocks=128, max_num_seqs=4, num_threads=1)
stream = pipeline.stream("abc", SamplingParams(temperature=0.0, max_tokens=450))
next(stream)
stream.close()
try:
    print("running", flush=True)  # the signal may come before this returns
    while True:
        pipeline(["abc"] * 50, SamplingParams(temperature=0.0, max_tokens=450))
except KeyboardInterrupt:
    while pipeline._engine._live:
        time.sleep(0.01)  # a busy loop would hold up the engine's thread
    print("nothing runs", len(pipeline("abc", SamplingParams(max_tokens=3)).token_ids), flush=True)
"""


def test_an_interrupt_aborts_everything_and_the_process_ends_cleanly(tiny_llama):
    command = [sys.executable, "-c", INTERRUPTED, str(tiny_llama)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "running\n"
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert out == "nothing runs 3\n", err
    assert process.returncode == 0
    assert "Traceback" not in err
