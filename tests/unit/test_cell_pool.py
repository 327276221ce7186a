"""How a comparison listens to the processes of its cells; here they are scripts of a few lines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.cell_pool import CellPool
from flows.cell_worker import Event, Request
from flows.recipe import make_recipe

REQUEST = Request(recipe=make_recipe({"model": "m", "ratio": 0.2, "name": "c: a"}), goal="evaluate", comparison="c")
PoolOf = Callable[[str], CellPool]
ANSWERS = """import json; of = json.loads(request)["comparison"]
    print(json.dumps({"kind": "say", "text": of}), flush=True)
    print(json.dumps({"kind": "end", "run_id": of}), flush=True)
"""


@pytest.fixture
def pool_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PoolOf]:
    """Gives a pool whose process runs some lines of Python."""
    pools = []

    def make(code: str) -> CellPool:
        def start(*_: object) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", code]
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, errors="replace")

        monkeypatch.setattr(CellPool, "_start", start)
        pools.append(CellPool(tmp_path, 1))
        return pools[-1]

    yield make
    for pool in pools:
        pool.stop()


def said(*events: Event) -> str:
    """Code that reads a request and says these."""
    return "input()\n" + "".join(f"print({event.model_dump_json()!r})\n" for event in events)


def test_what_a_cell_says_is_heard_to_its_end(pool_of: PoolOf) -> None:
    heard: list[Event] = []
    line, end = Event(kind="say", text="here"), Event(kind="end", run_id="r")
    assert pool_of(said(line, end, line)).carry_out(REQUEST, heard.append) == end
    assert heard == [line]


@pytest.mark.parametrize("torn", ['print("{")', 'print("no event")', 'sys.stdout.buffer.write(b"\\xff\\n")'])
def test_lines_that_are_no_events_are_passed_over(torn: str, pool_of: PoolOf) -> None:
    end = Event(kind="end", run_id="r")
    code = f"import sys\n{torn}\nsys.stdout.flush()\n{said(end)}"
    assert pool_of(code).carry_out(REQUEST, lambda _: None) == end


@pytest.mark.parametrize(
    ("code", "how"), [("raise SystemExit(3)", "ended with status 3"), ("input(); print('{')", "ended with status 0")]
)
def test_a_process_that_ends_without_a_word_is_said(code: str, how: str, pool_of: PoolOf) -> None:
    assert how in pool_of(code).carry_out(REQUEST, lambda _: None).text


@pytest.mark.parametrize("error", [ValueError("the listener's own"), BrokenPipeError("the listener's own")])
def test_an_error_of_who_listens_is_its_own_and_the_next_cell_hears_nothing_of_this_one(
    error: Exception, pool_of: PoolOf
) -> None:
    def listener(_: Event) -> None:
        raise error

    pool = pool_of(f"for number in range(2):\n    request = input()\n    {ANSWERS}")
    with pytest.raises(type(error), match="the listener's own"):
        pool.carry_out(REQUEST, listener)
    other = REQUEST.model_copy(update={"comparison": "other"})
    assert pool.carry_out(other, lambda _: None).run_id == "other"
