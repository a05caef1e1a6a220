import random

import pytest
from pilotfish.text.detokenizer import IncrementalDetokenizer
from pilotfish.text.token_bytes import rule_from_decoder
from pilotfish.text.tokenizer import Tokenizer
from tokenizers import Tokenizer as Backend


def pieces(tokenizer, ids, **options):
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@pytest.mark.parametrize("skip", [True, False])
def test_random_ids_add_up_to_the_whole_decode(any_path, skip):
    """The definition is the `tokenizers` package's own decode of all ids at once."""
    tokenizer, backend = Tokenizer.from_directory(any_path), Backend.from_file(str(any_path / "tokenizer.json"))
    byte_ids = [i for i in range(tokenizer.vocab_size) if (backend.id_to_token(i) or "").startswith("<0x")]
    rng = random.Random(5)
    for _ in range(300):
        ids = rng.choices(range(tokenizer.vocab_size), k=rng.randint(0, 40))
        if byte_ids:  # runs of byte tokens that are no character: the exception the class states, tested below
            ids = [i for i in ids if i not in byte_ids]
        assert "".join(pieces(tokenizer, ids, skip_special_tokens=skip)) == backend.decode(ids, skip_special_tokens=skip)


def test_text_comes_character_by_character_however_tokens_cut_it(any_path, make_text):
    """Every piece is valid by itself: half a character is never shown, and a whole one is never kept."""
    tokenizer = Tokenizer.from_directory(any_path)
    rng = random.Random(6)
    for _ in range(100):
        text = make_text(rng)
        ids = tokenizer.encode(text, add_special_tokens=False)
        detokenizer = IncrementalDetokenizer(tokenizer)
        shown, data = "", b""
        for token_id in ids:
            shown += detokenizer.push(token_id)
            data += tokenizer.token_bytes(token_id)
            whole = data.decode(errors="ignore")  # all whole characters so far
            assert shown == whole.removeprefix(" " * tokenizer.bytes_rule.leading_spaces)
        assert shown == text
        assert detokenizer.flush() == ""


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xe4\xbd\xa0\xff", "你\ufffd"),  # Hugging Face would give four replacements: it takes the good character back
        (b"\xe4\xbd", "\ufffd\ufffd"),
        (b"\xe4\xbdA", "\ufffd\ufffdA"),
        (b"\xf0\x9f\x98", "\ufffd\ufffd\ufffd"),
        (b"\x80\x80", "\ufffd\ufffd"),
        (b"\xff\xe4\xbd\xa0", "\ufffd你"),
    ],
)
def test_byte_fallback_replaces_each_bad_byte(sentencepiece_path, data, text):
    tokenizer = Tokenizer.from_directory(sentencepiece_path)
    backend = Backend.from_file(str(sentencepiece_path / "tokenizer.json"))
    assert "".join(pieces(tokenizer, [backend.token_to_id(f"<0x{byte:02X}>") for byte in data])) == text


def test_a_completion_keeps_the_space_and_an_answer_drops_it(sentencepiece_path):
    tokenizer = Tokenizer.from_directory(sentencepiece_path)
    prompt, continuation = tokenizer.encode("The quick"), tokenizer.encode("brown fox", add_special_tokens=False)
    assert "".join(pieces(tokenizer, continuation)) == "brown fox"
    assert "".join(pieces(tokenizer, continuation, continues_text=True)) == " brown fox"
    assert tokenizer.decode(prompt + continuation) == "The quick brown fox"


def test_special_tokens_do_not_break_a_character(byte_level_path):
    tokenizer = Tokenizer.from_directory(byte_level_path)
    ids = tokenizer.encode("😀")
    assert len(ids) > 1
    cut = [ids[0], tokenizer.eos_token_id, *ids[1:]]
    assert "".join(pieces(tokenizer, cut)) == "😀"
    assert "<|end|>" in "".join(pieces(tokenizer, cut, skip_special_tokens=False))


def test_flush_ends_the_wait(byte_level_path):
    tokenizer = Tokenizer.from_directory(byte_level_path)
    detokenizer = IncrementalDetokenizer(tokenizer)
    half = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xf0")
    assert detokenizer.push(half) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_a_rule_without_a_decoder_joins_words():
    assert rule_from_decoder(None).to_bytes("word") == b" word"
