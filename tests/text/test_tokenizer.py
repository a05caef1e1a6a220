import json
import random
import shutil

import pytest
from pilotfish.common.errors import InvalidRequest, ModelLoadError
from pilotfish.text.tokenizer import Tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer


def test_ids_and_text_equal_transformers(any_path, make_text):
    ours, theirs = Tokenizer.from_directory(any_path), AutoTokenizer.from_pretrained(any_path)
    rng = random.Random(1)
    texts = [make_text(rng) for _ in range(150)]
    texts += ["", " ", "\n", "a", " a", "  a  b ", f"x{theirs.eos_token}y {theirs.bos_token} z", "<tool>é <|pad|>  b"]
    for text in texts:
        for add_special_tokens in (True, False):
            ids = ours.encode(text, add_special_tokens=add_special_tokens)
            assert ids == theirs(text, add_special_tokens=add_special_tokens).input_ids, text
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), text


def test_facts_equal_transformers(any_path):
    ours, theirs = Tokenizer.from_directory(any_path), AutoTokenizer.from_pretrained(any_path)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert set(theirs.all_special_ids) <= ours.special_ids
    assert ours.special_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special}


def test_sentencepiece_ids_equal_the_llama_class(sentencepiece_path, tmp_path, make_text):
    """transformers rebuilds the pipeline of a LlamaTokenizer instead of reading it; the ids must not depend on that.

    One difference is theirs: before a text that begins with a space it leaves out the space that SentencePiece adds.
    """
    shutil.copytree(sentencepiece_path, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "LlamaTokenizer"}))
    ours, theirs = Tokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "LlamaTokenizer"
    rng = random.Random(2)
    for _ in range(50):
        text = make_text(rng).lstrip(" ")
        assert ours.encode(text) == theirs(text).input_ids
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text).input_ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "extra",
    [
        {"extra_special_tokens": ["<|new|>"]},
        {"additional_special_tokens": ["<|new|>"]},
        {"pad_token": {"__type": "AddedToken", "content": "<|new|>", "lstrip": True, "rstrip": False, "normalized": False}},
        {"added_tokens_decoder": {"402": {"content": "<|new|>", "special": True, "rstrip": True, "normalized": False}}},
        {"added_tokens_decoder": {"402": {"content": "<|new|>", "special": False, "normalized": False}}},
        {"eos_token": "The"},
    ],
)
def test_tokens_that_only_the_configuration_has(byte_level_path, tmp_path, extra):
    shutil.copytree(byte_level_path, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **extra}))
    ours, theirs = Tokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "The fox <|new|> jumps<|new|>over The dog"
    ids = ours.encode(text)
    assert ids == theirs(text).input_ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.vocab_size == len(theirs)
    assert ours.eos_token_id == theirs.eos_token_id


def test_truncation_and_padding_of_the_file_do_not_apply(byte_level_path, tmp_path):
    shutil.copytree(byte_level_path, tmp_path, dirs_exist_ok=True)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=200)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "The quick brown fox jumps over the lazy dog. " * 20
    assert Tokenizer.from_directory(tmp_path).encode(text) == Tokenizer.from_directory(byte_level_path).encode(text)


def test_token_bytes_join_to_the_text(any_path, make_text):
    tokenizer = Tokenizer.from_directory(any_path)
    rng = random.Random(3)
    for _ in range(50):
        text = make_text(rng)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == " " * tokenizer.bytes_rule.leading_spaces + text


def test_ids_without_a_token_have_no_bytes(byte_level_path):
    tokenizer = Tokenizer.from_directory(byte_level_path)
    assert tokenizer.token_bytes(tokenizer.vocab_size) == tokenizer.token_bytes(-1) == b""
    assert tokenizer.decode([tokenizer.vocab_size + 7, *tokenizer.encode("fox")]) == "fox"


def test_a_continuation_has_no_leading_space_of_its_own(any_path):
    tokenizer = Tokenizer.from_directory(any_path)
    for text in ("fox", " fox", "\nfox", "é", " 😀"):
        ids = tokenizer.encode_continuation(text)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text


def test_a_lone_surrogate_is_refused(byte_level_path):
    with pytest.raises(InvalidRequest, match="lone surrogate at character 1"):
        Tokenizer.from_directory(byte_level_path).encode("a\ud800b")


def test_damaged_directories(byte_level_path, tmp_path):
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(ModelLoadError, match="cannot read"):
        Tokenizer.from_directory(tmp_path)
    shutil.copy(byte_level_path / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="not valid JSON"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ModelLoadError, match="must hold a JSON object, not list"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.ByteLevel(),
        decoders.Sequence([decoders.ByteLevel()]),
        decoders.Metaspace(),
        decoders.Metaspace(prepend_scheme="never"),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()]),
        decoders.Fuse(),
        None,
    ],
)
def test_every_supported_decoder_equals_its_own_decode(decoder):
    vocabulary = ["▁a", "▁", "b", "▁▁", "c▁d", "Ġx", "é", "▁😀", "<0x41>"]
    backend = Backend(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="b"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        backend.decoder = decoder
    tokenizer = Tokenizer(backend, {})
    rng = random.Random(4)
    for _ in range(500):
        ids = rng.choices(range(len(vocabulary)), k=rng.randint(0, 5))
        assert tokenizer.decode(ids) == backend.decode(ids), [vocabulary[i] for i in ids]


@pytest.mark.parametrize("decoder", [decoders.WordPiece(), decoders.Strip(" ", 0, 1), decoders.CTC()])
def test_a_decoder_that_cannot_stream_is_refused(decoder):
    backend = Backend(models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = decoder
    with pytest.raises(ModelLoadError, match="cannot produce text token by token"):
        Tokenizer(backend, {})
