"""A seeded small number of damaged inputs of every kind; tests/fuzz.py runs more."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import fuzz  # noqa: E402


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damage_is_told_in_one_line(kind):
    assert fuzz.fuzz(kind, 40, seed=100_000) == []


def test_a_reader_that_breaks_or_hangs_or_shows_an_escape_sequence_is_found(monkeypatch):
    """Negative control."""
    def reader(path):
        data = Path(path).read_bytes()
        if len(data) % 3 == 0:
            raise KeyError("translation")
        if len(data) % 3 == 1:
            print("\x1b[2J")
    monkeypatch.setitem(fuzz.KINDS, "broken", lambda folder: ("b.txt", b"ab", reader))
    found = {wrong for _, wrong in fuzz.fuzz("broken", 30, seed=0)}
    assert found == {"KeyError: 'translation'", "an escape sequence on the screen"}

    def wordy(path):
        raise fuzz.model.InputError("two\nlines")
    monkeypatch.setitem(fuzz.KINDS, "wordy", lambda folder: ("b.txt", b"ab", wordy))
    assert fuzz.fuzz("wordy", 1, seed=0) == [
        (-1, "the undamaged file: told in no line, or in several: two\nlines")]

    calls = []

    def hangs(path):
        calls.append(path)
        while len(calls) > 1:                                  # the first one is the good file
            pass
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setitem(fuzz.KINDS, "slow", lambda folder: ("b.txt", b"ab", hangs))
    assert {wrong for _, wrong in fuzz.fuzz("slow", 1, seed=0)} == {"more than 1 s"}
