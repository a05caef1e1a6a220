"""Which nodes are left out; tests/cluster/test_hosts.py cuts real ones."""

from __future__ import annotations

import pytest
from pilotfish.controller.node_links import smallest_cover


@pytest.mark.parametrize(
    ("cuts", "cover"),
    [
        ([], []),
        ([("a", "b")], ["a"]),
        ([("a", "b"), ("b", "c"), ("b", "d")], ["b"]),
        ([("a", "b"), ("c", "d"), ("b", "d"), ("b", "e")], ["b", "c"]),
    ],
)
def test_the_fewest_nodes_that_are_in_every_cut(cuts: list[tuple[str, str]], cover: list[str]) -> None:
    assert smallest_cover(cuts) == cover
