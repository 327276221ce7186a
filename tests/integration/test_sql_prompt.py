"""`blockpruner sql` without a query: in a terminal, and with statements on standard input."""

from __future__ import annotations

import csv
import io
import os
import pty
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from tests.integration.command_line import ROOT, blockpruner
from tests.unit.store_lab import Lab

PROMPT, CONTINUED = "blockpruner> ", "        ...> "
LONG = "SELECT count(*) FROM range(1000000000) a, range(1000000) b WHERE a.range * b.range % 7 = 3;"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("prompt"))
    lab.results.ingest(lab.run())
    return lab


class Terminal:
    """A person at a terminal in which the prompt runs."""

    def __init__(self, descriptor: int, pid: int) -> None:
        self._descriptor, self.pid, self._shown = descriptor, pid, ""

    def expect(self, text: str) -> str:
        """Wait for a text; gives what came up to its end."""
        assert self._appears(text, 60), f"waited in vain for {text!r}: {self._shown!r}"
        before, _, self._shown = self._shown.partition(text)
        return before + text

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C, again if need be: readline sleeps through one that comes just before it waits for a key."""
        for _ in range(6):
            self.type("\x03")
            if self._appears(PROMPT, 10):
                break
        self.expect(PROMPT)

    def _appears(self, text: str, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while text not in self._shown and time.monotonic() < deadline:
            if select.select([self._descriptor], [], [], 0.1)[0]:
                self._shown += os.read(self._descriptor, 4096).decode().replace("\r", "")
        return text in self._shown

    def status(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@contextmanager
def terminal(lab: Lab, home: Path) -> Iterator[Terminal]:
    program = "from flows.cli import app; app(prog_name='blockpruner')"
    command = [sys.executable, "-c", program, "sql", "--csv", "--workspace", str(lab.workspace)]
    given = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(home), "TERM": "dumb", "INPUTRC": "/dev/null"}
    pid, descriptor = pty.fork()
    if pid == 0:
        os.execve(sys.executable, command, given)
    try:
        yield Terminal(descriptor, pid)
    finally:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(descriptor)


def test_a_conversation(lab: Lab, tmp_path: Path) -> None:
    before = lab.results.path.read_bytes()
    with terminal(lab, tmp_path) as person:
        assert "results.duckdb, for reading" in person.expect(PROMPT)
        person.type("SELECT name,\n")
        person.expect(CONTINUED)
        person.type("1 + 1 AS two FROM runs;\n")
        assert "name,two\nnight,2\n" in person.expect(PROMPT)
        person.type("DROP TABLE runs;\n")
        assert "Error: give one SQL statement that reads" in person.expect(PROMPT)
        person.type(".tabels\n")
        assert "Error: no command '.tabels'" in person.expect(PROMPT)
        person.type("SELECT work_s\t FROM search_steps LIMIT 1;\n")  # a tab completes it
        assert "work_saved\n0.0\n" in person.expect(PROMPT)
        person.type("SELECT nothing\n")
        person.expect(CONTINUED)
        person.interrupt()  # Ctrl-C drops what was begun
        person.type(LONG + "\n")
        person.expect("= 3;\n")
        time.sleep(1.0)
        person.interrupt()  # and a query that takes too long
        person.type("\x04")
        assert person.status() == 0
    with terminal(lab, tmp_path) as person:  # the history is there the next time
        person.expect(PROMPT)
        person.type("\x1b[A" * 2 + "\x01\x0bSELECT 6 * 7;\n")
        assert "\n42\n" in person.expect("\n42\n")
        person.type(".quit\n")
        assert person.status() == 0
    assert "SELECT nothing" in (tmp_path / "blockpruner" / "sql_history").read_text()
    assert lab.results.path.read_bytes() == before


def test_an_order_to_end_ends_it(lab: Lab, tmp_path: Path) -> None:
    with terminal(lab, tmp_path) as person:
        person.expect(PROMPT)
        time.sleep(1.0)  # until it waits for a line
        os.kill(person.pid, signal.SIGTERM)
        assert person.status() == 128 + signal.SIGTERM


def piped(lab: Lab, text: bytes | str) -> tuple[int, str, str]:
    given = ["sql", "--csv", "--workspace", str(lab.workspace)]
    result = CliRunner().invoke(app, given, input=text, prog_name="blockpruner")
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_statements_from_a_pipe(lab: Lab) -> None:
    status, stdout, stderr = piped(lab, "SELECT 1 AS a; SELECT 2\nAS b;\n.tables\nSELECT 'x;y' AS c")
    assert (status, stderr) == (0, "")
    lines = stdout.splitlines()
    assert lines[:4] == ["a", "1", "b", "2"]
    assert lines[-2:] == ["c", "x;y"]
    assert {"runs", "leaderboard", "stage_cost"} <= set(lines)


def test_the_first_error_of_a_pipe_is_one_line_and_the_end(lab: Lab) -> None:
    status, stdout, stderr = piped(lab, "SELECT 1 AS a;\nSELEC 2;\nSELECT 3 AS c;\n")
    assert (status, stdout.splitlines()) == (2, ["a", "1"])
    (line,) = stderr.splitlines()
    assert line.startswith("Error: Parser Error")


def test_what_is_no_text_is_one_line(lab: Lab) -> None:
    process = subprocess.run(
        [sys.executable, "-c", "from flows.cli import app; app()", "sql", "--workspace", lab.workspace],
        input=b"SELECT '\xff';\n",
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:strict"},
        check=False,
    )
    assert process.returncode == 2
    (line,) = process.stderr.decode().splitlines()
    assert line.startswith("Error: standard input is no text")


def test_schemas_are_those_of_the_database(lab: Lab) -> None:
    """What `.schema` shows of the tables makes the same columns, in another database than ours."""
    shown = blockpruner("sql", "DESCRIBE exports", "--workspace", lab.workspace, "--json").json
    _, stdout, _ = piped(lab, ".schema exports\n")
    with sqlite3.connect(":memory:") as other:
        other.execute(stdout)
        found = [(row[1], row[2]) for row in other.execute("PRAGMA table_info(exports)")]
    assert found == [(row["column_name"], row["column_type"]) for row in shown]


def test_for_people_numbers_are_short_and_for_programs_whole(lab: Lab) -> None:
    query = ["sql", "SELECT 1 / 3 AS third", "--workspace", lab.workspace]
    assert blockpruner(*query).stdout.split() == ["third", "0.333333"]
    (row,) = csv.DictReader(io.StringIO(blockpruner(*query, "--csv").stdout))
    assert float(row["third"]) == 1 / 3
