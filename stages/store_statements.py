"""Where one SQL statement ends and the next begins, in text that is typed line by line. Runs nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

_TOKENS = re.compile(
    r"""
      (?P<end> ; )
    | (?P<comment> --[^\r\n]* )
    | (?P<opened> /\* )                                                         # a comment that may hold others
    | (?<![\w$]) [eE] '(?: [^'\\] | \\. | '' )*(?: ' | \\?\Z )                  # a backslash hides a quote
    | '[^']*(?: ' | \Z ) | "[^"]*(?: " | \Z ) | (?<![\w$]) (?P<tag> \$(?:[^\W\d]\w*)?\$ ).*?(?: (?P=tag) | \Z )
    """,
    re.VERBOSE | re.DOTALL,
)
_COMMENT_MARKS = re.compile(r"/\*|\*/")

Kind = Literal["end", "comment", "quoted"]


def split_statements(text: str) -> tuple[list[str], str]:
    """The statements that end with a semicolon, without it, and what follows the last one. Blank ones are left out."""
    statements, start = list[str](), 0
    for kind, begin, end in _tokens(text):
        if kind == "end":
            statements.append(text[start:begin].strip())
            start = end
    return [statement for statement in statements if not is_blank(statement)], text[start:]


def is_blank(text: str) -> bool:
    """Whether there is nothing in it but spaces and comments."""
    rest, start = "", 0
    for kind, begin, end in _tokens(text):
        if kind == "comment":
            rest += text[start:begin]
            start = end
    return not (rest + text[start:]).strip()


def _tokens(text: str) -> Iterator[tuple[Kind, int, int]]:
    """What a semicolon does not end, and semicolons that do: where each begins and ends."""
    position = 0
    while found := _TOKENS.search(text, position):
        position = _comment_end(text, found.end()) if found["opened"] else found.end()
        kind: Kind = "end" if found["end"] else "comment" if found["comment"] or found["opened"] else "quoted"
        yield kind, found.start(), position


def _comment_end(text: str, position: int) -> int:
    """Where a comment ends in which `position` lies; the text's end, if nothing closes it."""
    depth = 1
    for mark in _COMMENT_MARKS.finditer(text, position):
        depth += 1 if mark[0] == "/*" else -1
        if depth == 0:
            return mark.end()
    return len(text)
