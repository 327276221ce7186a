"""Rows of text from the bytes of a local file: .txt, .jsonl, .csv or .parquet. Opens no file; knows no tokenizer.

In a .txt a row is a line that is not blank, stripped. In the others a row is the value of one column, unchanged; it
must be a string.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from blockpruner.errors import TextSourceError, nearest
from blockpruner.foreign_files import parsed_json

FileFormat = Literal["txt", "jsonl", "csv", "parquet"]

SUFFIXES: tuple[str, ...] = tuple(f".{name}" for name in get_args(FileFormat))
"""What the name of a text file may end with."""


def file_format(path: Path) -> FileFormat:
    """The format that a file's suffix says.

    Raises:
        TextSourceError: if it is none of `SUFFIXES`.
    """
    for name in get_args(FileFormat):
        if path.suffix.lower() == f".{name}":
            return name  # type: ignore[no-any-return]
    raise TextSourceError(f"{path} has the suffix {path.suffix!r}; a text file ends with {', '.join(SUFFIXES)}")


def parse_rows(content: bytes, form: FileFormat, column: str, name: str) -> list[str]:
    """The rows in a file's content, in order.

    Args:
        content: the whole file.
        form: how to read it.
        column: which column to take; a .txt has none.
        name: what to call the file in messages.

    Raises:
        TextSourceError: if the content is empty or damaged, lacks the column, or a value there is not a string.
    """
    if not content:
        raise TextSourceError(f"{name} is empty; give a file with text")
    if form == "parquet":
        rows = _parquet_rows(content, column, name)
    else:
        text = _decode(content, name)
        if form == "txt":
            rows = [line.strip() for line in io.StringIO(text, newline=None) if line.strip()]
        elif form == "jsonl":
            rows = list(_jsonl_rows(text, column, name))
        else:
            rows = list(_csv_rows(text, column, name))
    if not rows:
        raise TextSourceError(f"{name} is empty: it has no row of text; give a file with text")
    return rows


_NAME_IT = "name the column with the text (calibration_column, eval_text_column)"


def missing_column(name: str, column: str, columns: list[str]) -> TextSourceError:
    """The error for a column that is not there: says which are."""
    known = ", ".join(columns) or "none"
    return TextSourceError(
        f"{name} has no column {column!r}; its columns: {known}{nearest(column, columns)}; {_NAME_IT}"
    )


def not_text(name: str, where: str, column: str, value: object) -> TextSourceError:
    """The error for a value that is not a string."""
    held = "nothing (null); take it out, or" if value is None else f"{type(value).__name__}, not a string;"
    return TextSourceError(f"{name}, {where}: column {column!r} holds {held} {_NAME_IT}")


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextSourceError(
            f"{name} is not UTF-8: byte {content[error.start]:#04x} at offset {error.start}; convert it to UTF-8"
        ) from error


def _jsonl_rows(text: str, column: str, name: str) -> Iterator[str]:
    # Only "\n" ends a line: a JSON string may hold the other characters that str.splitlines splits at.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parsed_json(line)
        except ValueError as error:
            raise TextSourceError(
                f"{name}, line {number} is not valid JSON ({error}); write one object a line"
            ) from error
        if not isinstance(record, dict):
            raise TextSourceError(f"{name}, line {number} is a JSON {type(record).__name__}; write one object a line")
        if column not in record:
            raise missing_column(f"{name}, line {number}", column, list(record))
        if not isinstance(record[column], str):
            raise not_text(name, f"line {number}", column, record[column])
        if not _is_unicode(record[column]):
            raise TextSourceError(f"{name}, line {number}: column {column!r} holds half a surrogate pair; repair it")
        yield record[column]


def _is_unicode(text: str) -> bool:
    r"""Whether a string has a UTF-8 form; JSON's \ud800 escapes can spell strings that have none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv_rows(text: str, column: str, name: str) -> Iterator[str]:
    with _long_csv_fields():
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            columns = list(reader.fieldnames or [])
            if column not in columns:
                raise missing_column(name, column, columns)
            for record in reader:
                value = record[column]
                if value is None:
                    raise TextSourceError(f"{name}, line {reader.line_num} has fewer fields than the header; repair it")
                yield value
        except csv.Error as error:
            raise TextSourceError(
                f"{name}, line {reader.reader.line_num} is not valid CSV ({error}); repair it"
            ) from error


@contextmanager
def _long_csv_fields() -> Iterator[None]:
    """Lift the csv module's limit of 128 KiB a field, which is global, for as long as we read."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet_rows(content: bytes, column: str, name: str) -> list[str]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(content))
        columns = list(file.schema_arrow.names)
        values = file.read(columns=[column]).column(column).to_pylist() if column in columns else None
    except (pyarrow.ArrowException, OSError) as error:
        raise TextSourceError(f"{name} is not a valid parquet file ({' '.join(str(error).split())})") from error
    if values is None:
        raise missing_column(name, column, columns)
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str):
            raise not_text(name, f"row {number}", column, value)
    return list(values)
