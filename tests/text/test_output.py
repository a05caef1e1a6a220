import random

import pytest
from pilotfish.common.errors import InternalError
from pilotfish.common.requests import FinishReason, SequenceOutput, TokenLogprob
from pilotfish.common.sampling_params import SamplingParams
from pilotfish.text.output import SequenceText, TextDelta
from pilotfish.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(byte_level_path):
    return Tokenizer.from_directory(byte_level_path)


def output(offset, ids=(), finish=None, logprobs=()):
    return SequenceOutput(request_id="r", offset=offset, token_ids=tuple(ids), finish_reason=finish, logprobs=tuple(logprobs))


def feed(text, ids, finish=FinishReason.LENGTH, step=1):
    """Push ids `step` at a time, the finish reason with the last ones, until the choice ends."""
    deltas = []
    for start in range(0, len(ids), step):
        end = start + step
        deltas.append(text.push(output(start, ids[start:end], finish if end >= len(ids) else None)))
        if text.finish_reason is not None:
            break
    return deltas


def joined(deltas):
    return "".join(delta.text for delta in deltas)


@pytest.mark.parametrize("step", [1, 2, 5, 100])
@pytest.mark.parametrize("include", [True, False])
def test_stop_strings_cut_the_text_and_the_tokens(tokenizer, step, include):
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog.")
    text = SequenceText(tokenizer, SamplingParams(stop=("own f", "lazy"), include_stop_str_in_output=include))
    deltas = feed(text, ids, step=step)
    assert joined(deltas) == "The quick brown f"[: None if include else len("The quick br")]
    reported = [token_id for delta in deltas for token_id in delta.token_ids]
    assert reported == ids[: len(reported)]
    decoded = tokenizer.decode(reported)
    assert "own f" in decoded
    assert "own f" not in tokenizer.decode(reported[:-1])
    last = deltas[-1]
    assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, "own f")
    assert text.should_abort == (step < 100)
    assert text.num_tokens == len(reported)


def test_text_is_the_whole_decode_however_steps_cut_it(tokenizer, make_text):
    rng = random.Random(9)
    for _ in range(50):
        ids = rng.choices(range(tokenizer.vocab_size), k=rng.randint(1, 30))
        text = SequenceText(tokenizer, SamplingParams(stop=("never this",)))
        deltas = feed(text, ids, step=rng.randint(1, 8))
        assert joined(deltas) == tokenizer.decode(ids)
        assert [delta.offset for delta in deltas] == [sum(len(d.token_ids) for d in deltas[:i]) for i in range(len(deltas))]


def test_what_is_held_back_comes_with_the_end(tokenizer):
    text = SequenceText(tokenizer, SamplingParams(stop=("dog!",)))
    ids = tokenizer.encode("lazy dog")
    shown = [text.push(output(i, [token_id])).text for i, token_id in enumerate(ids)]
    assert "".join(shown) == "lazy "
    delta = text.push(output(len(ids), (), FinishReason.ABORT))
    assert delta == TextDelta(text="dog", finish_reason=FinishReason.ABORT, offset=len(ids))
    assert not text.should_abort


def test_a_stop_string_in_the_last_step_wins_over_its_reason(tokenizer):
    text = SequenceText(tokenizer, SamplingParams(stop=("dog",)))
    (delta,) = feed(text, tokenizer.encode("lazy dog"), FinishReason.LENGTH, step=100)
    assert (delta.finish_reason, delta.stop_reason, delta.text) == (FinishReason.STOP, "dog", "lazy ")
    assert not text.should_abort


def test_stop_strings_wait_for_min_tokens(tokenizer):
    ids = tokenizer.encode("a dog, a dog, a cat")
    first = next(i for i in range(len(ids)) if "dog" in tokenizer.decode(ids[: i + 1])) + 1
    for min_tokens, expected in ((0, "a "), (first, "a dog, a "), (len(ids), "a dog, a dog, a cat")):
        text = SequenceText(tokenizer, SamplingParams(stop=("dog",), min_tokens=min_tokens))
        assert joined(feed(text, ids)) == expected


def test_end_tokens_are_reported_but_not_shown(tokenizer):
    ids = [*tokenizer.encode("fox"), tokenizer.eos_token_id]
    for skip, expected in ((True, "fox"), (False, "fox<|end|>")):
        text = SequenceText(tokenizer, SamplingParams(skip_special_tokens=skip))
        deltas = feed(text, ids, FinishReason.STOP)
        assert joined(deltas) == expected
        assert [token_id for delta in deltas for token_id in delta.token_ids] == ids
        assert deltas[-1].finish_reason == FinishReason.STOP


def test_replayed_tokens_are_dropped_and_a_gap_is_an_error(tokenizer):
    ids = tokenizer.encode("The quick brown fox")
    logprobs = [TokenLogprob(token_id, -0.5, 1) for token_id in ids]
    text = SequenceText(tokenizer, SamplingParams(logprobs=0))
    first = text.push(output(0, ids[:3], logprobs=logprobs[:3]))
    assert text.push(output(1, ids[1:3], logprobs=logprobs[1:3])).is_empty
    second = text.push(output(1, ids[1:], FinishReason.LENGTH, logprobs[1:]))
    assert first.text + second.text == "The quick brown fox"
    assert (second.offset, second.token_ids, second.logprobs) == (3, tuple(ids[3:]), tuple(logprobs[3:]))
    with pytest.raises(InternalError, match="tokens 0 to 1 of the output are missing"):
        SequenceText(tokenizer, SamplingParams()).push(output(2, ids[:1]))


def test_after_the_end_everything_is_dropped(tokenizer):
    text = SequenceText(tokenizer, SamplingParams(stop=("q",)))
    feed(text, tokenizer.encode("The quick brown"))
    assert text.push(output(9, [5, 6], FinishReason.ABORT)).is_empty
    assert text.finish_reason == FinishReason.STOP


def test_a_completion_continues_its_prompt(sentencepiece_path):
    tokenizer = Tokenizer.from_directory(sentencepiece_path)
    ids = tokenizer.encode("brown", add_special_tokens=False)
    assert joined(feed(SequenceText(tokenizer, SamplingParams(), continues_text=True), ids)) == " brown"
    assert joined(feed(SequenceText(tokenizer, SamplingParams()), ids)) == "brown"
