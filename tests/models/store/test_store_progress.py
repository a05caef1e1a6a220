"""What a user sees while a model is pulled."""

import sys

import pytest
from pilotfish.models.store_progress import Progress, terminal_progress


def _two_phases(progress: Progress) -> None:
    for done in range(4):
        progress("Downloading", done, 3, unit="B")
    for done in range(3):
        progress("Converting", done, 2, unit="tensors")


def test_one_line_for_each_phase_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal_progress() as progress:
        _two_phases(progress)
    assert capsys.readouterr().err == "Downloading\nConverting\n"


def test_a_bar_for_each_phase_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with terminal_progress() as progress:
        _two_phases(progress)
    drawn = capsys.readouterr().err
    assert "Downloading: 100%" in drawn
    assert "Converting:  50%" in drawn
    assert "Converting: 100%" in drawn
