import json

import pytest
from pilotfish.common.errors import InvalidRequest, ModelLoadError
from pilotfish.common.sampling_params import SamplingParams
from pilotfish.text.generation_defaults import GenerationDefaults, load, merge
from pilotfish.text.tokenizer import Tokenizer


def write(directory, generation=None, config=None):
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            (directory / name).write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": 9}, (2,)),
        ({"eos_token_id": [5, 3, 5]}, {}, (5, 3)),
        ({}, {"eos_token_id": 0}, (0,)),
        (None, {"eos_token_id": [7, 8]}, (7, 8)),
        (None, {"text_config": {"eos_token_id": 4}}, (4,)),
        ({"eos_token_id": None}, {"eos_token_id": 6}, (6,)),
        (None, None, ()),
    ],
)
def test_end_tokens(tmp_path, generation, config, expected):
    write(tmp_path, generation, config)
    assert load(tmp_path).end_token_ids == expected


def test_the_tokenizer_names_the_end_token_where_no_configuration_does(tmp_path, byte_level_path):
    tokenizer = Tokenizer.from_directory(byte_level_path)
    assert load(tmp_path, tokenizer=tokenizer).end_token_ids == (tokenizer.eos_token_id,)
    write(tmp_path, {"eos_token_id": 5})
    assert load(tmp_path, tokenizer=tokenizer).end_token_ids == (5,)


@pytest.mark.parametrize("eos", ["</s>", [1, "2"], -1, True])
def test_a_wrong_end_token_is_named(tmp_path, eos):
    write(tmp_path, {"eos_token_id": eos})
    with pytest.raises(ModelLoadError, match="eos_token_id must be a token id or a list"):
        load(tmp_path)


def test_sampling_is_what_the_checkpoint_states(tmp_path):
    write(
        tmp_path, {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None, "max_new_tokens": 7, "use_cache": True}
    )
    assert load(tmp_path).sampling == {"temperature": 0.6, "top_p": 0.9, "max_tokens": 7}


def test_a_checkpoint_that_does_not_sample_is_greedy(tmp_path):
    write(tmp_path, {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1})
    assert load(tmp_path).sampling == {"temperature": 0.0, "repetition_penalty": 1.1}


def test_merge_takes_the_request_then_the_chosen_defaults():
    defaults = GenerationDefaults(end_token_ids=(), sampling={"temperature": 0.6, "top_p": 0.9, "max_tokens": 5})
    explicit = {"temperature": 1.0, "seed": 3}
    assert merge(explicit, defaults=defaults, mode="openai") == SamplingParams(seed=3)
    assert merge(explicit, defaults=defaults, mode="model") == SamplingParams(temperature=1.0, top_p=0.9, max_tokens=5, seed=3)
    assert merge({"min_tokens": 9}, defaults=defaults, mode="model").max_tokens is None
    with pytest.raises(InvalidRequest, match="did you mean 'temperature'"):
        merge({"temprature": 1}, defaults=defaults)
