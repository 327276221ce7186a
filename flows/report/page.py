"""The HTML page: one file with its style, its script and plotly.js in it, which fetches nothing.

Every value goes through the template's escaping or, for the pictures, through JSON without a '<'. The page's own
content security policy lets no script run but the two whose digests it names, and lets nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from flows.report.picture import Picture
from flows.report.theme import DARK, LIGHT
from flows.summary import finite
from flows.table_formats import DataTable, shown

_FILES = Path(__file__).with_name("page")
_SHARES = frozenset({"parameters removed", "accuracy", "standard error"})
"""What the columns that hold shares from 0 to 1 are called, up to a comma."""


@dataclass(frozen=True)
class Card:
    """One number that matters, in large letters."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    name: str
    title: str
    pictures: tuple[Picture, ...] = ()
    table: DataTable | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunDetails:
    """One run's settings, and how to do it again."""

    label: str
    facts: tuple[tuple[str, str], ...]
    recipe: str
    script: str
    error: str | None


@dataclass(frozen=True)
class Page:
    """Everything that is on the page."""

    title: str
    subtitle: str
    made: str
    cards: tuple[Card, ...]
    sections: tuple[Section, ...]
    details: tuple[RunDetails, ...]
    source: str


def render(page: Page) -> str:
    """The page as HTML."""
    environment = Environment(loader=FileSystemLoader(_FILES), autoescape=True, undefined=StrictUndefined)
    environment.filters["cell"] = _cell
    environment.filters["is_number"] = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    scripts = [_plotly_js(), (_FILES / "page.js").read_text(encoding="utf-8")]
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {_digests(scripts)}"
    pictures = [picture for section in page.sections for picture in section.pictures]
    return environment.get_template("page.html").render(
        page=page,
        policy=policy,
        style=Markup((_FILES / "page.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        drawings=_drawings(pictures),
    )


def _plotly_js() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs()).replace("</script", "<\\/script")


def _digests(scripts: Sequence[str]) -> str:
    """The scripts as a content security policy names them."""
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


def _drawings(pictures: Sequence[Picture]) -> Markup:
    """Every picture in both themes, as JSON that no HTML parser can take for anything else."""
    drawn: dict[str, Any] = {
        picture.name: {theme.name: picture.draw(theme) for theme in (LIGHT, DARK)} for picture in pictures
    }
    text = json.dumps(finite(drawn), ensure_ascii=True, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # has no character left that HTML knows


def _cell(value: object, column: str) -> str:
    """A value as the tables show it: a share as a percentage."""
    if isinstance(value, float) and column.partition(",")[0] in _SHARES:
        return f"{value:.2%}"
    return shown(value)
