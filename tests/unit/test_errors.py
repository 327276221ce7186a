"""What is told of the errors of others."""

from __future__ import annotations

import pytest

from blockpruner.errors import one_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one"), "one"),
        (ValueError("one\n  two\r\n"), "one two"),
        (ValueError(), "ValueError"),
        (KeyboardInterrupt(" \n"), "KeyboardInterrupt"),
        (ValueError("x" * 300), "x" * 300),
        (ValueError("x" * 301), "x" * 297 + "..."),
    ],
)
def test_an_error_is_told_on_one_line(error: BaseException, line: str) -> None:
    assert one_line(error) == line
