"""Ways to spoil good files by chance, as hypothesis strategies; and how a command has to take it.

The same examples on every machine. FUZZ_FACTOR=10 tries ten times as many, other ones each time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.integration.bad_input_lab import refused
from tests.integration.command_line import Outcome

Path = tuple[str | int, ...]

FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))

_TOKENS = (
    *(
        b"&a ",
        b"*a",
        b"<<: ",
        b"!!int ",
        b"!!binary ",
        b"0x",
        b"{",
        b"}",
        b"[",
        b"]",
        b"- ",
        b"? ",
        b": ",
        b"\t",
        b"---\n",
    ),
    *(
        b"|\n",
        b"#",
        b"'",
        b'"',
        b'"\\e[2J"',
        b'"\\ud800"',
        b"null",
        b".nan",
        b".inf",
        b"true",
        b"-1",
        b"9" * 40,
        b"1e400",
    ),
    *(b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n\n", b"..", b"/", b"hub://", b"~x", b",", b"{}", b"\xe2\x80\xa8"),
)
_NUMBERS = st.sampled_from(
    (0, -1, 1, 2, 7, 1.5, 10**4, 2**31, 2**63, 10**30, -(10**12), 1e308, float("nan"), float("inf"))
)
_TEXTS = st.sampled_from(("", " ", "a", "../x", "\x1b[2J", "a\nb", "x" * 1000, "\0", "auto", "évil/kernel", "float16"))
_LEAVES = st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXTS)
JUNK = st.one_of(_LEAVES, st.lists(_LEAVES, max_size=3), st.dictionaries(_TEXTS, _LEAVES, max_size=2))
"""What stands in JSON where something else should."""


def fuzz(num_examples: int) -> settings:
    """That many examples, or a multiple; a folder that all of them use is what the tests want."""
    allowed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=num_examples * FACTOR, derandomize=FACTOR == 1, suppress_health_check=allowed)


def done_or_refused(outcome: Outcome) -> None:
    """The command did its work, or said in one line why it does not."""
    if outcome.status != 0:
        refused(outcome)


@st.composite
def spoiled_bytes(draw: st.DrawFn, good: bytes) -> bytes:
    """The bytes with one to four edits: cut off, taken out, doubled, flipped, or something put in."""
    content = good
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + draw(st.sampled_from((1, 8, 64))))))
        match draw(st.sampled_from(("cut", "take out", "double", "flip", "put in", "put in"))):
            case "cut":
                content = content[:start]
            case "take out":
                content = content[:start] + content[end:]
            case "double":
                content = content[:end] + content[start:]
            case "flip":
                flipped = bytes(byte ^ draw(st.integers(1, 255)) for byte in content[start:end][:4])
                content = content[:start] + flipped + content[start + len(flipped) :]
            case _:
                content = content[:start] + draw(st.sampled_from(_TOKENS)) + content[start:]
    return content


@st.composite
def spoiled_json(draw: st.DrawFn, good: bytes) -> bytes:
    """The document with one to three values replaced, taken out or added anywhere in it."""
    document = json.loads(good)
    for _ in range(draw(st.integers(1, 3))):
        *inner, last = draw(st.sampled_from(sorted(_paths(document), key=repr)))
        place = document
        for step in inner:
            place = place[step]
        match draw(st.sampled_from(("replace", "replace", "take out", "add"))):
            case "take out":
                del place[last]
            case "add" if isinstance(place, dict):
                place[draw(_TEXTS)] = draw(JUNK)
            case _:
                place[last] = draw(JUNK)
    return json.dumps(document).encode()


def _paths(value: Any, path: Path = ()) -> Iterator[Path]:
    """Every place in a document, but at most the first few of a long list."""
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, item in items[:60]:
        yield (*path, key)
        yield from _paths(item, (*path, key))
