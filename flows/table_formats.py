"""One table in the forms that other programs and papers take: JSON, CSV, Markdown, LaTeX. Computes and prints nothing.

JSON and CSV hold the values as they are; Markdown and LaTeX hold them as people read them. What comes from users is
escaped in each.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from blockpruner.errors import ConfigurationError
from flows.summary import dump_json, finite
from flows.wording import one_line

TableFormat = Literal["json", "csv", "markdown", "latex"]

_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "{}$&#%_"},
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
}
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~&$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)
"""Characters that mean something: an underscore only where it does not stand between letters or digits, a colon or dot
where an address would become a link. (GitHub makes a link of an e-mail address whatever is done to it.)"""
_FORMULA = re.compile(r"\s*[=+\-@]")
"""How a text begins that a spreadsheet computes."""
_AFTER_A_LINE = ("[", "*")
"""How a row begins that LaTeX takes for an option of the line break or rule before it."""


@dataclass(frozen=True)
class DataTable:
    """Names of columns, and rows of plain values: text, numbers, True and False, None."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    @property
    def records(self) -> list[dict[str, Any]]:
        """A dictionary a row, fit for JSON: None for a number that is not finite."""
        return [dict(zip(self.columns, map(finite, row), strict=True)) for row in self.rows]

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds nothing but numbers, which stand to the right."""
        columns = [[row[index] for row in self.rows if row[index] is not None] for index in range(len(self.columns))]
        return [bool(values) and all(isinstance(v, int | float) for v in values) for values in columns]


def chosen_format(
    *, as_json: bool = False, as_csv: bool = False, as_markdown: bool = False, as_latex: bool = False
) -> TableFormat | None:
    """The form that was asked for on the command line; None: for people.

    Raises:
        ConfigurationError: if more than one is.
    """
    asked: dict[TableFormat, bool] = {"json": as_json, "csv": as_csv, "markdown": as_markdown, "latex": as_latex}
    chosen = [name for name, wanted in asked.items() if wanted]
    if len(chosen) > 1:
        every = [f"--{name}" for name in chosen]
        given = f"both {every[0]} and {every[1]}" if len(every) == 2 else f"{', '.join(every[:-1])} and {every[-1]}"
        raise ConfigurationError(f"{given} are given; give one of them")
    return chosen[0] if chosen else None


def formatted(table: DataTable, form: TableFormat) -> str:
    """The table as text, without a line break at its end."""
    if form == "json":
        return dump_json(table.records)
    if form == "csv":
        return csv_text(table.columns, table.rows).removesuffix("\n")
    return markdown_table(table) if form == "markdown" else latex_table(table)


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Comma-separated values, with a line of names.

    A text that a spreadsheet would compute when it opens the file gets an apostrophe before it, unless it is a number.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows(map(_for_csv, (columns, *rows)))
    return text.getvalue()


def markdown_table(table: DataTable) -> str:
    """A table as GitHub, and Prefect's server, draw it; numbers to the right."""
    marks = ["---:" if is_number else "---" for is_number in table.numeric]
    lines = [map(in_markdown, table.columns), marks, *(map(in_markdown, row) for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def latex_table(table: DataTable) -> str:
    r"""A tabular in the style of papers; the document needs \usepackage{booktabs}."""
    alignment = "".join("r" if is_number else "l" for is_number in table.numeric)
    head, *body = [_latex_row(line) for line in (table.columns, *table.rows)]
    begin = rf"\begin{{tabular}}{{{alignment}}}"
    return "\n".join([begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"])


def shown(value: object) -> str:
    """A value as people read it, on one line: four digits of a number that was measured, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return _measured(value)
    return one_line(str(value))


def _measured(value: float) -> str:
    return f"{value:.4g}" if not math.isfinite(value) or abs(value) < 1000 else f"{value:,.0f}"


def in_markdown(value: object) -> str:
    """A value as text that Markdown takes for nothing else."""
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", shown(value))


def _latex_row(values: Sequence[Any]) -> str:
    row = " & ".join(map(_for_latex, values)) + r" \\"
    return f"{{}}{row}" if row.startswith(_AFTER_A_LINE) else row


def _for_csv(row: Sequence[Any]) -> list[Any]:
    return [f"'{value}" if isinstance(value, str) and _computed(value) else value for value in row]


def _computed(text: str) -> bool:
    if not _FORMULA.match(text):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False


def _for_latex(value: object) -> str:
    return "".join(_LATEX.get(character, character) for character in shown(value))
