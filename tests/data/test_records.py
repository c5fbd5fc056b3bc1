"""What is written of names that come from anywhere."""

from __future__ import annotations

import pytest

from busigen.data.sources.records import Refusal
from busigen.text import printable


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("brüst (1).png", "brüst (1).png"),
        ("\udcff.png", "\\udcff.png"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\nb\tc\0", "a\\nb\\tc\\x00"),
        ("\x7f\x80\x9b31m\x9f\xa0", "\\x7f\\x80\\x9b31m\\x9f\\xa0"),
    ],
)
def test_a_terminal_has_nothing_to_obey(text: str, written: str) -> None:
    assert printable(text) == written
    assert Refusal(text, text, text).to_dict() == {"file": written, "problem": written, "fix": written}
