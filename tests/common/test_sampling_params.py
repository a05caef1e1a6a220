import math

import pytest
from pilotfish.common.errors import InvalidRequest
from pilotfish.common.sampling_params import SamplingParams


def test_defaults_are_openais() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.n, params.max_tokens) == (1.0, 1.0, 0, 1, None)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty, params.logprobs) == (0, 0, 1, None)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("n", [0, 129, 1.5, True]),
        ("temperature", [-0.1, math.nan, math.inf, "hot", 10**400]),
        ("top_p", [0, 1.01, -1]),
        ("top_k", [-2, 1.0]),
        ("min_p", [-0.1, 1.1]),
        ("repetition_penalty", [0, -1]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("min_tokens", [-1]),
        ("max_tokens", [0, -5]),
        ("seed", [2**63, 1.5, 10**5000]),
        ("logprobs", [-1, 21]),
        ("logit_bias", [{"a": 1}, {1: 101}, {-1: 0}, [1], {1: math.nan}, {1: 10**400}, dict.fromkeys(range(1025), 0)]),
        ("stop", [[""], "", [1], [str(i) for i in range(17)], ["\ud800"], "x" * 1001]),
        ("bad_words", [[""], [3], ["x"] * 1025]),
        ("stop_token_ids", [[-1], ["a"], [True], 5, [1] * 1025]),
        ("ignore_eos", [1, None]),
    ],
)
def test_each_parameter_out_of_range_is_named(name, bad) -> None:
    for value in bad:
        with pytest.raises(InvalidRequest, match=name):
            SamplingParams(**{name: value})


def test_ends_of_ranges_are_allowed() -> None:
    SamplingParams(n=128, temperature=0, top_p=1, top_k=-1, min_p=1, presence_penalty=-2, frequency_penalty=2, logprobs=20)


def test_min_tokens_above_max_tokens() -> None:
    with pytest.raises(InvalidRequest, match="min_tokens"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_one_stop_string_may_stand_alone_and_json_keys_become_ids() -> None:
    params = SamplingParams(stop="END", logit_bias={"7": 1})
    assert params.stop == ("END",)
    assert params.logit_bias == {7: 1.0}


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'temperature'"):
        SamplingParams.from_mapping({"temprature": 1})
