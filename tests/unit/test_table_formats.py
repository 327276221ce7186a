"""A table in four forms, each read back by the reader that it is for."""

from __future__ import annotations

import csv
import io
import json

import pytest
from markdown_it import MarkdownIt

from blockpruner.errors import ConfigurationError
from flows.table_formats import DataTable, chosen_format, formatted

AWKWARD = r"a|b_c\d & 50% of $x^2$ {~} #1 <script>*é*`[y](z)` _u_"
TABLE = DataTable(
    ("run", "perplexity", "my_count"), ((AWKWARD, 5.4712, 12345), ("two\nlines", float("inf"), None), ("", None, 0))
)


def test_json_has_the_values_and_no_infinity() -> None:
    assert json.loads(formatted(TABLE, "json")) == [
        {"run": AWKWARD, "perplexity": 5.4712, "my_count": 12345},
        {"run": "two\nlines", "perplexity": None, "my_count": None},
        {"run": "", "perplexity": None, "my_count": 0},
    ]
    assert "\n" not in formatted(TABLE, "json")


def test_csv_has_the_values() -> None:
    rows = list(csv.reader(io.StringIO(formatted(TABLE, "csv"))))
    assert rows[0] == list(TABLE.columns)
    assert rows[1:] == [[AWKWARD, "5.4712", "12345"], ["two\nlines", "inf", ""], ["", "", "0"]]


def test_markdown_is_one_table_with_the_text_as_it_is() -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse(formatted(TABLE, "markdown"))
    cells = [token.children or [] for token in tokens if token.type == "inline"]
    assert {child.type for cell in cells for child in cell} == {"text"}  # no markup, no HTML, no code
    found = ["".join(child.content for child in cell) for cell in cells]
    assert found == [*TABLE.columns, AWKWARD, "5.471", "12,345", "two lines", "inf", "", "", "", "0"]


def test_latex_has_a_line_a_row_and_every_special_character_escaped() -> None:
    lines = formatted(TABLE, "latex").splitlines()
    assert lines[:4] == [r"\begin{tabular}{lrr}", r"\toprule", r"run & perplexity & my\_count \\", r"\midrule"]
    assert lines[4] == (
        r"a\textbar{}b\_c\textbackslash{}d \& 50\% of \$x\textasciicircum{}2\$ \{\textasciitilde{}\} \#1 "
        r"\textless{}script\textgreater{}*é*`[y](z)` \_u\_ & 5.471 & 12,345 \\"
    )
    assert lines[5:] == [r"two lines & inf &  \\", r" &  & 0 \\", r"\bottomrule", r"\end{tabular}"]


def test_one_form_at_a_time() -> None:
    assert chosen_format() is None
    assert chosen_format(as_latex=True) == "latex"
    with pytest.raises(ConfigurationError, match="both --json and --csv are given; give one of them"):
        chosen_format(as_json=True, as_csv=True)
    with pytest.raises(ConfigurationError, match="--json, --csv and --latex are given"):
        chosen_format(as_json=True, as_csv=True, as_latex=True)
