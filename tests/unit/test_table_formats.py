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


def test_csv_gives_a_spreadsheet_nothing_to_compute() -> None:
    texts = ['=HYPERLINK("http://x","y")', "@SUM(1)", "+1+1", "-2*3", "\t=1", "-x"]
    table = DataTable(("=a", "n"), tuple((text, -1.5) for text in texts))
    head, *rows = csv.reader(io.StringIO(formatted(table, "csv")))
    assert head == ["'=a", "n"]
    assert rows == [[f"'{text}", "-1.5"] for text in texts]
    numbers = DataTable(("n",), (("-1.5",), ("+2e-3",), (float("-inf"),), ("a=b",)))
    assert formatted(numbers, "csv").splitlines() == ["n", "-1.5", "+2e-3", "-inf", "a=b"]


def test_markdown_makes_no_links() -> None:
    """As GitHub's own parser (cmark-gfm) was seen to take them: an escaped colon or dot begins no address."""
    table = DataTable(("x",), (("https://evil.example/x",), ("WWW.evil.example",), ("a@b.example 10:30 v1.2",)))
    cells = [line.strip("| ") for line in formatted(table, "markdown").splitlines()[2:]]
    assert cells == [r"https\://evil.example/x", r"WWW\.evil.example", r"a\@b.example 10:30 v1.2"]
    assert MarkdownIt("commonmark").render(cells[0]) == "<p>https://evil.example/x</p>\n"


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


def test_no_row_is_an_option_of_the_line_before_it_in_latex() -> None:
    """After a line break or a rule LaTeX reads on for a star or a length in brackets."""
    table = DataTable(("[x]", "y"), (("[2mm] a", "[b]"), ("*c", "*"), (" [d", 1)))
    head, _, *rows, _, _ = formatted(table, "latex").splitlines()[2:]
    assert head == r"{}[x] & y \\"
    assert rows == [r"{}[2mm] a & [b] \\", r"{}*c & * \\", r"{}[d & 1 \\"]


def test_one_form_at_a_time() -> None:
    assert chosen_format() is None
    assert chosen_format(as_latex=True) == "latex"
    with pytest.raises(ConfigurationError, match="both --json and --csv are given; give one of them"):
        chosen_format(as_json=True, as_csv=True)
    with pytest.raises(ConfigurationError, match="--json, --csv and --latex are given"):
        chosen_format(as_json=True, as_csv=True, as_latex=True)
