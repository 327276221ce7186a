"""What is told of the errors of others."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

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


def test_an_error_without_anything_in_it_is_no_error_of_its_own() -> None:
    assert one_line(ValidationError.from_exception_data("Size", [])) == "0 validation errors for Size"


class Size(BaseModel):
    """Something to be wrong about."""

    sides: tuple[int, ...]
    unit: str


@pytest.mark.parametrize(
    ("schema", "text", "line"),
    [
        (Size, '{"sides": [1, "x"]}', "sides.1: Input should be a valid integer, unable to parse string as an integer"),
        (Size, "{}", "sides: Field required"),
        (int, "[]", "Input should be a valid integer"),
    ],
)
def test_of_what_does_not_fit_a_schema_the_first_thing_is_told(schema: type, text: str, line: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(schema).validate_json(text)
    assert one_line(caught.value) == line
