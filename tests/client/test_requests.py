import pytest
from pilotfish.client.requests import (
    ChatOptions,
    GenerateOptions,
    SamplingOptions,
    chat_call,
    generate_call,
    tokenize_request,
)
from pilotfish.common.errors import InvalidRequest
from pilotfish.common.sampling_params import SamplingParams
from pilotfish.proto import common_pb2 as common


def sent(params=None, **options):
    return {field.name: value for field, value in generate_call("x", params, options).request.sampling.ListFields()}


def test_the_options_the_class_and_the_message_have_the_same_fields():
    fields = set(SamplingParams.__dataclass_fields__)
    assert set(SamplingOptions.__annotations__) == fields == set(common.SamplingParams.DESCRIPTOR.fields_by_name)
    for kind, name in ((GenerateOptions, "GenerateRequest"), (ChatOptions, "ChatRequest")):
        call = generate_call if kind is GenerateOptions else chat_call
        known = set(call("x", None, {}).request.DESCRIPTOR.fields_by_name)
        assert set(kind.__annotations__) - fields - {"timeout_s"} <= known, name


def test_only_what_was_set_is_sent():
    assert sent() == {}
    assert sent(SamplingParams(temperature=0.5, max_tokens=8)) == {"temperature": 0.5, "max_tokens": 8}
    assert sent(SamplingParams(temperature=1.0)) == {}  # equal to the class's default: not told apart from silence
    assert sent({"temperature": 1.0}) == sent(temperature=1.0) == {"temperature": 1.0}
    assert sent({"max_tokens": None}, seed=None) == {}
    assert sent(SamplingParams(temperature=0.5, seed=1), seed=2, top_p=1.0) == {"temperature": 0.5, "seed": 2, "top_p": 1.0}


def test_every_field_travels():
    values = {
        "n": 2,
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {5: -1.0},
        "bad_words": ["bad"],
        "stop": ["end", "\n"],
        "stop_token_ids": [3],
        "min_tokens": 1,
        "max_tokens": 9,
        "ignore_eos": True,
        "seed": -5,
        "logprobs": 0,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    assert set(values) == set(SamplingParams.__dataclass_fields__)
    message = generate_call("x", None, values).request.sampling
    assert dict(message.logit_bias) == values["logit_bias"]
    for name, value in values.items():
        got = getattr(message, name)
        assert (dict(got) if name == "logit_bias" else list(got) if isinstance(value, list) else got) == value
    assert sent(SamplingParams.from_mapping(values)).keys() == values.keys()
    assert generate_call("x", None, values).num_choices == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sent(temprature=1), "unknown sampling parameter 'temprature'; did you mean 'temperature'"),
        (lambda: sent(temperature=-1), r"temperature must be a number in \[0"),
        (lambda: sent(max_tokens="9"), "max_tokens must be an integer"),
        (lambda: sent(5), "params must be SamplingParams or a mapping"),
        (lambda: sent(priority="high"), "options of their types"),
        (lambda: sent(priority=2**40), "options of their types"),
        (lambda: sent(model=7), "options of their types"),
        (lambda: sent(continue_final_message=True), "unknown sampling parameter 'continue_final_message'"),
        (lambda: generate_call("a\ud800", None, {}), "the prompt must be text or token ids"),
        (lambda: generate_call(None, None, {}), "the prompt must be text or token ids"),
        (lambda: generate_call(["a"], None, {}), "the prompt must be text or token ids"),
        (lambda: generate_call([2**31], None, {}), "the prompt must be text or token ids"),
        (lambda: chat_call([{"role": "user"}], None, {}), r"messages\[0\] must be an object with the strings role and content"),
        (lambda: chat_call([{"role": "user", "content": 5}], None, {}), r"messages\[0\] must be"),
        (lambda: chat_call(["hi"], None, {}), r"messages\[0\] must be"),
        (lambda: chat_call("a\udfff", None, {}), r"messages\[0\] must be"),
        (lambda: chat_call("hi", None, {"echo": True}), "unknown sampling parameter 'echo'"),
        (lambda: chat_call("hi", None, {"model": 7}), "wrong type"),
        (lambda: tokenize_request("a\ud800", model="", add_special_tokens=True), "not valid Unicode"),
    ],
)
def test_mistakes_raise_before_anything_is_sent(call, message):
    with pytest.raises(InvalidRequest, match=message):
        call()


def test_an_empty_prompt_is_sent_as_what_it_is():
    assert generate_call("", None, {}).request.WhichOneof("prompt") == "text"
    assert generate_call([], None, {}).request.WhichOneof("prompt") == "tokens"
