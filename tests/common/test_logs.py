"""Lines of the log as they come out: for people, and for a log store."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import datetime

import pytest
from pilotfish.common import logs
from pilotfish.common.errors import ConfigError


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    logger = logging.getLogger("pilotfish")
    before = (logger.handlers[:], logger.propagate, logger.level)
    for name in (logs.LEVEL_VARIABLE, logs.FORMAT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    yield
    logger.handlers[:], logger.propagate, level = before
    logger.setLevel(level)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_json_lines_have_place_and_request(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("replica-0", rank=1, log_format="json")
    logger = logging.getLogger("pilotfish.part")
    token = logs.request_id.set("req-1")
    logger.warning('says "%s"\nand more', "hé")
    logs.request_id.reset(token)
    logger.info("went on", extra=logs.about("req-2", num_tokens=3, replica=None))
    logger.debug("not shown")
    first, second = map(json.loads, lines(capsys))
    assert datetime.fromisoformat(first.pop("time")).utcoffset() is not None
    assert first == {
        "level": "WARNING",
        "role": "replica-0",
        "rank": 1,
        "logger": "pilotfish.part",
        "message": 'says "hé"\nand more',
        "request_id": "req-1",
    }
    assert (second["request_id"], second["num_tokens"]) == ("req-2", 3)
    assert "replica" not in second


def test_an_exception_stays_in_its_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "json")
    logs.set_up("controller")
    try:
        raise ValueError("bad")
    except ValueError:
        logging.getLogger("pilotfish").exception("it failed")
    (line,) = lines(capsys)
    entry = json.loads(line)
    assert entry["exception"].endswith("ValueError: bad")
    assert "rank" not in entry
    assert "request_id" not in entry


def test_text_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("replica-0", rank=1)
    token = logs.request_id.set("req-1")
    logging.getLogger("pilotfish.part").info("hello", extra=logs.about("req-1", num_tokens=3))
    logs.request_id.reset(token)
    (line,) = lines(capsys)
    assert line.endswith(" I replica-0/1 pilotfish.part [req-1]: hello")


def test_a_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "xml")
    with pytest.raises(ConfigError, match="PILOTFISH_LOG_FORMAT must be one of text, json, not 'xml'"):
        logs.set_up("controller")


def test_another_process_gets_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.LEVEL_VARIABLE, "debug")
    assert logs.environment(log_level="auto", log_format="json") == {
        logs.LEVEL_VARIABLE: "debug",
        logs.FORMAT_VARIABLE: "json",
    }
    assert logs.environment(log_level="error", log_format="auto") == {logs.LEVEL_VARIABLE: "error"}
