import random

import pytest
from pilotfish.text.stop_strings import StopMatcher


def naive(text: str, stop: tuple[str, ...], *, include: bool) -> tuple[str, str | None]:
    """Read the text character by character; the first moment that ends with a stop string ends it (the longest of several)."""
    for end in range(len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def run(chunks: list[str], stop: tuple[str, ...], *, include: bool) -> tuple[str, str | None]:
    matcher = StopMatcher(stop, include=include)
    shown = ""
    for chunk in chunks:
        text, matched = matcher.push(chunk)
        shown += text
        if matched is not None:
            return shown, matched
    return shown + matcher.flush(), None


@pytest.mark.parametrize("include", [True, False])
def test_random_texts_cut_anywhere_match_as_the_whole_text_does(include):
    rng = random.Random(7)
    num_matches = 0
    for _ in range(5000):
        alphabet = rng.choice(["ab", "abc", "a b\n", "é😀x"])
        stop = tuple({"".join(rng.choices(alphabet, k=rng.randint(1, 6))) for _ in range(rng.randint(1, 4))})
        chunks = ["".join(rng.choices(alphabet, k=rng.randint(0, 4))) for _ in range(rng.randint(0, 8))]
        expected = naive("".join(chunks), stop, include=include)
        assert run(chunks, stop, include=include) == expected, (chunks, stop)
        num_matches += expected[1] is not None
    assert 1000 < num_matches < 4500  # both outcomes were exercised


def test_only_what_may_begin_a_stop_string_is_held():
    rng = random.Random(8)
    for _ in range(2000):
        stop = tuple("".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(2))
        matcher = StopMatcher(stop, include=False)
        text = shown = ""
        while len(text) < 12:
            chunk = rng.choice("abc")
            text += chunk
            safe, matched = matcher.push(chunk)
            shown += safe
            if matched is not None:
                break
            held = text[len(shown) :]
            assert not held or any(s.startswith(held) for s in stop)
            longest = max((n for n in range(5) for s in stop if n < len(s) and text.endswith(s[:n])), default=0)
            assert len(held) == longest


def test_without_stop_strings_text_passes():
    matcher = StopMatcher((), include=False)
    assert matcher.push("abc") == ("abc", None)
    assert matcher.flush() == ""


def test_a_long_stop_string_across_many_chunks():
    stop = "###END OF THE ANSWER###" * 20
    assert run(["text ", *stop, "more"], (stop,), include=False) == ("text ", stop)
    assert run(["text ", *stop[:-1]], (stop,), include=False) == ("text " + stop[:-1], None)
