"""API keys: made, hashed, found, and never shown."""

from __future__ import annotations

import hmac

import pytest
from pilotfish.common.api_keys import KeyRing, hash_line, make_key
from pilotfish.common.errors import ConfigError

KEYS = [make_key(bytes([n] * 8), bytes([n + 100] * 32)) for n in range(3)]


def test_a_key_is_found_by_its_hash_only():
    ring = KeyRing({"acme": [hash_line(KEYS[0]), hash_line(KEYS[1])], "zoo": [hash_line(KEYS[2])]})
    assert len(ring) == 3
    assert [ring.owner(key) for key in KEYS] == ["acme", "acme", "zoo"]
    for key in KEYS:
        assert key[-43:] not in hash_line(key)
        assert hash_line(key).startswith(key[3:19] + ":")


@pytest.mark.parametrize(
    "key",
    [
        "",
        "pf-",
        KEYS[0][:-1],
        KEYS[0] + "A",
        KEYS[0].upper(),
        KEYS[0][:19] + KEYS[1][19:],  # an id with another's secret
        make_key(b"\x09" * 8, b"\x64" * 32),  # a secret with another id
        hash_line(KEYS[0]),
        "\u00e9" * 63,
    ],
)
def test_anything_else_is_nobodys(key):
    assert KeyRing({"acme": map(hash_line, KEYS)}).owner(key) is None


def test_a_wrong_id_costs_the_same_comparison(monkeypatch):
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr("pilotfish.common.api_keys.hmac.compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    ring = KeyRing({"acme": [hash_line(KEYS[0])]})
    assert ring.owner(KEYS[0]) == "acme"
    assert ring.owner(KEYS[1]) is None
    assert [len(a) == len(b) == 64 for a, b in compared] == [True, True]


def test_a_ring_of_wrong_lines_says_what_to_do_and_shows_no_key():
    with pytest.raises(ConfigError, match="pilotfish keys new") as wrong:
        KeyRing({"acme": [KEYS[0]]})
    assert KEYS[0][20:] not in str(wrong.value)
    with pytest.raises(ConfigError, match="not a pilotfish API key") as wrong:
        hash_line("sk-secret")
    assert "sk-secret" not in str(wrong.value)
    with pytest.raises(ConfigError, match="given twice, to acme and zoo"):
        KeyRing({"acme": [hash_line(KEYS[0])], "zoo": [hash_line(KEYS[0])]})
