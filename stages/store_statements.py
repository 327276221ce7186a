"""Where one SQL statement ends and the next begins, in text that is typed line by line. Runs nothing."""

from __future__ import annotations

import re

_TOKENS = re.compile(
    r"""
      (?P<end> ; )
    | (?P<comment> --[^\n]* | /\*.*?(?:\*/|\Z) )
    | '[^']*(?:'|\Z) | "[^"]*(?:"|\Z) | (\$\w*\$).*?(?:\3|\Z)   # what a semicolon does not end
    """,
    re.VERBOSE | re.DOTALL,
)


def split_statements(text: str) -> tuple[list[str], str]:
    """The statements that end with a semicolon, without it, and what follows the last one. Blank ones are left out."""
    statements, start = list[str](), 0
    for token in _TOKENS.finditer(text):
        if token["end"]:
            statements.append(text[start : token.start()].strip())
            start = token.end()
    return [statement for statement in statements if not is_blank(statement)], text[start:]


def is_blank(text: str) -> bool:
    """Whether there is nothing in it but spaces and comments."""
    return not _TOKENS.sub(lambda token: "" if token["comment"] else token[0], text).strip()
