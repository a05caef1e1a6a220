from hashlib import blake2b

from pilotfish.common.hashing import block_hashes, root_hash, version_salt


def test_a_hash_names_the_whole_prefix() -> None:
    tokens = list(range(48))
    hashes = block_hashes(tokens, 16, parent=root_hash())
    assert len(set(hashes)) == 3
    assert block_hashes(tokens[:40], 16, parent=root_hash()) == hashes[:2]
    assert block_hashes([9, *tokens[1:]], 16, parent=root_hash())[2] != hashes[2]
    assert block_hashes(tokens, 16, parent=root_hash(b"other"))[0] != hashes[0]


def test_versions_and_salts_do_not_meet() -> None:
    pairs = [
        (version, salt) for version in ("", "2", "22", "2\xff", "é") for salt in (b"", b"2", b"\xff", b"acme", b"2\xffacme")
    ]
    assert len({version_salt(*pair) for pair in pairs}) == len(pairs)
    assert version_salt("", b"acme") == b"acme"


def test_a_growing_sequence_hashes_only_its_new_blocks() -> None:
    tokens = list(range(64))
    first = block_hashes(tokens[:32], 16, parent=root_hash())
    assert first + block_hashes(tokens[32:], 16, parent=first[-1]) == block_hashes(tokens, 16, parent=root_hash())


def test_the_definition() -> None:
    tokens = [1, 2**31 - 1, 3, 4] * 4
    data = b"".join(token.to_bytes(4, "little") for token in tokens)
    assert block_hashes(tokens, 16, parent=b"p") == [blake2b(b"p" + data, digest_size=16).digest()]
