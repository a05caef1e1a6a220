"""Every test that docs/production-pains.md names exists, and every pain that applies has one."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", flags=re.MULTILINE)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


@cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    functions = (node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return {function.name for function in functions if function.name.startswith("test_")}


def test_every_test_that_the_table_names_exists() -> None:
    rows = ROW.findall((ROOT / "docs" / "production-pains.md").read_text())
    assert [int(number) for number, *_ in rows] == list(range(1, 21))
    for number, _, what, shown in rows:
        named = TEST.findall(shown)
        assert bool(named) != what.startswith("Not built"), f"row {number}: tests, or why there are none"
        assert TEST.sub("", shown).strip(" ,-") == "", f"row {number} names something that is no test"
        missing = [f"{file}::{name}" for file, name in named if name not in functions_of(file)]
        assert missing == [], f"row {number}"
