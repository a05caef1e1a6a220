import pytest
from pilotfish.common.errors import InvalidRequest
from pilotfish.common.requests import EngineRequest, TokenSampling
from pilotfish.common.sampling_params import SamplingParams
from pilotfish.text.prepare import ModelLimits, choice_seed, prepare
from pilotfish.text.tokenizer import Tokenizer

LIMITS = ModelLimits(max_model_len=100, vocab_size=600, kv_capacity_tokens=1000)


@pytest.fixture(scope="session")
def tokenizer(byte_level_path):
    return Tokenizer.from_directory(byte_level_path)


@pytest.fixture
def run(tokenizer):
    def run(prompt="The quick brown fox", limits=LIMITS, *, request_id="r", end_token_ids=(1,), options=None, **params):
        return prepare(
            request_id=request_id,
            prompt=prompt,
            params=SamplingParams(**params),
            tokenizer=tokenizer,
            limits=limits,
            end_token_ids=end_token_ids,
            entropy=lambda: 42,
            **(options or {}),
        )

    return run


def test_everything_is_resolved(run, tokenizer):
    ids = tuple(tokenizer.encode("The quick brown fox"))
    prepared = run(
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.4,
        logit_bias={5: 2},
        stop_token_ids=(9, 1),
        min_tokens=2,
        logprobs=3,
        options={"priority": 4, "deadline_ms": 99.0, "salt": b"tenant"},
    )
    assert prepared.prompt_token_ids == ids
    assert prepared.sequences[0].sampling.max_tokens == 100 - len(ids)
    assert prepared.sequences[0].sampling.seed == 42
    assert prepared.sequences == (
        EngineRequest(
            request_id="r",
            prompt_token_ids=ids,
            sampling=TokenSampling(
                temperature=0.5,
                top_p=0.9,
                top_k=3,
                min_p=0.1,
                repetition_penalty=1.2,
                presence_penalty=0.3,
                frequency_penalty=0.4,
                logit_bias={5: 2.0},
                end_token_ids=(1, 9),
                min_tokens=2,
                max_tokens=100 - len(ids),
                seed=42,
                logprobs=3,
            ),
            priority=4,
            deadline_ms=99.0,
            salt=b"tenant",
        ),
    )


def test_choices_have_names_and_seeds_of_their_own(run):
    prepared = run(n=3, seed=-7)
    assert [sequence.request_id for sequence in prepared.sequences] == ["r#0", "r#1", "r#2"]
    seeds = [sequence.sampling.seed for sequence in prepared.sequences]
    assert seeds == [-7, choice_seed(-7, 1), choice_seed(-7, 2)]
    assert len(set(seeds)) == 3
    assert all(-(2**63) <= choice_seed(2**63 - 1, index) < 2**63 for index in range(128))
    assert [s.sampling.seed for s in run(n=3, seed=-7).sequences] == seeds


def test_token_prompts_are_taken_as_they_are(run):
    assert run([5, 6, 7]).prompt_token_ids == (5, 6, 7)


def test_ignore_eos_leaves_the_callers_own_end_tokens(run):
    assert run(ignore_eos=True, stop_token_ids=(9,)).sequences[0].sampling.end_token_ids == (9,)


def test_bad_words_are_banned_with_and_without_a_space(run, tokenizer):
    banned = run(bad_words=("fox", " dog")).sequences[0].sampling.bad_words_ids
    texts = [b"".join(map(tokenizer.token_bytes, ids)).decode() for ids in banned]
    assert texts == ["fox", " fox", " dog"]


def test_bad_words_of_sentencepiece_have_no_space_of_the_tokenizers_own(sentencepiece_path):
    tokenizer = Tokenizer.from_directory(sentencepiece_path)
    prepared = prepare(
        request_id="r",
        prompt="a",
        params=SamplingParams(bad_words=("fox",)),
        tokenizer=tokenizer,
        limits=ModelLimits(max_model_len=100, vocab_size=tokenizer.vocab_size, kv_capacity_tokens=100),
        end_token_ids=(),
        entropy=lambda: 1,
    )
    assert prepared.prompt_token_ids[0] == tokenizer.bos_token_id
    banned = prepared.sequences[0].sampling.bad_words_ids
    assert [b"".join(map(tokenizer.token_bytes, ids)) for ids in banned] == [b"fox", b" fox"]


def test_max_tokens_is_what_fits(run):
    assert run([5] * 10).sequences[0].sampling.max_tokens == 90
    small = ModelLimits(max_model_len=100, vocab_size=600, kv_capacity_tokens=48)
    assert run([5] * 10, small).sequences[0].sampling.max_tokens == 38
    assert run([5] * 10, max_tokens=90).sequences[0].sampling.max_tokens == 90
    assert run([5] * 99).sequences[0].sampling.max_tokens == 1


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ("a\ud800", {}, "lone surrogate"),
        ([5] * 100, {}, "100 tokens, but the model's context has room for 100.*shorten the prompt to at most 99"),
        ([5] * 10, {"max_tokens": 91}, "10 tokens and max_tokens=91 make 101.*room for 100.*max_tokens to at most 90"),
        ([5] * 10, {"min_tokens": 91}, "min_tokens=91 is more than the 90 tokens"),
        ([5, 600], {}, "the prompt has the token id 600, outside.*0 to 599"),
        ([5, -1], {}, "token id -1"),
        ([5, True], {}, "must hold token ids"),
        ("a", {"stop_token_ids": (600,)}, "stop_token_ids has the token id 600"),
        ("a", {"logit_bias": {777: 1}}, "logit_bias has the token id 777"),
    ],
)
def test_refused_requests(run, prompt, params, message):
    with pytest.raises(InvalidRequest, match=message):
        run(prompt, **params)


def test_the_cache_limits_too(run):
    small = ModelLimits(max_model_len=100, vocab_size=600, kv_capacity_tokens=48)
    with pytest.raises(InvalidRequest, match="the KV cache has room for 48 tokens: set max_tokens to at most 38"):
        run([5] * 10, small, max_tokens=39)
    with pytest.raises(InvalidRequest, match="50 tokens, but the KV cache has room for 48"):
        run([5] * 50, small)


@pytest.mark.parametrize("request_id", ["", "a b", "a#1", "é", "x" * 129, "a\n"])
def test_refused_ids(run, request_id):
    with pytest.raises(InvalidRequest, match="request_id must be"):
        run(request_id=request_id)
