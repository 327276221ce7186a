"""Lines into statements, dot commands, and what a file or a pipe may hold; the terminal is in the integration tests."""

from __future__ import annotations

import duckdb
import pytest

from blockpruner.errors import ConfigurationError, StoreError
from flows.sql_prompt import Session, run_script
from stages.store_statements import is_blank, split_statements

DEFINITIONS = {"runs": "CREATE TABLE runs;", "exports": "CREATE TABLE exports;"}


@pytest.mark.parametrize(
    ("text", "statements", "rest"),
    [
        ("SELECT 1", [], "SELECT 1"),
        ("SELECT 1;", ["SELECT 1"], ""),
        ("SELECT 1; SELECT 2; FROM", ["SELECT 1", "SELECT 2"], " FROM"),
        ("SELECT ';' , \";\" -- ;\n;", ["SELECT ';' , \";\" -- ;"], ""),
        ("SELECT 'it''s; so';", ["SELECT 'it''s; so'"], ""),
        ("SELECT 'open; ", [], "SELECT 'open; "),
        ("SELECT /* ; */ 1;", ["SELECT /* ; */ 1"], ""),
        ("/* open ;", [], "/* open ;"),
        ("SELECT $$a;b$$, $x$;$$;$x$;", ["SELECT $$a;b$$, $x$;$$;$x$"], ""),
        (";;\n ; -- nothing\n;", [], ""),
    ],
)
def test_statements_end_at_semicolons_that_are_not_quoted(text: str, statements: list[str], rest: str) -> None:
    assert split_statements(text) == (statements, rest)


@pytest.mark.parametrize(
    "text",
    [
        r"SELECT E'it\'s; ok' AS a; SELECT 2;",
        r"SELECT e'a\\' AS a; SELECT E'a''b\';c';",
        r"SELECT notE'x\'; SELECT 'x\'; SELECT (E'\';');",
        "SELECT 1 /* a /* b; */ c; */; SELECT 2 /* '; */;",
        "SELECT '/*'; SELECT /**/ 2 /* /* */ ; */; SELECT 3;",
        "SELECT 1 -- a /* \r; SELECT 2;",
        "SELECT a$$b$$; SELECT $é1$;$é1$; SELECT $$a;b$$;",
        'SELECT U&\'a;b\'; SELECT "E\'"";";',
    ],
)
def test_statements_end_where_duckdb_ends_them(text: str) -> None:
    with duckdb.connect() as connection:
        expected = [statement.query.strip().rstrip(";").strip() for statement in connection.extract_statements(text)]
    assert split_statements(text) == (expected, "")


@pytest.mark.parametrize(
    "text", [r"SELECT E'open\'; ", "SELECT E'open\\", "SELECT /* a /* b */ ; ", "SELECT $x$ ; $$ "]
)
def test_what_is_not_closed_is_not_ended(text: str) -> None:
    assert split_statements(text) == ([], text)


@pytest.mark.parametrize(
    ("text", "blank"),
    [
        ("/* /* */ */", True),
        ("/* */ */", False),
        ("", True),
        (" -- a\n/* b */ ", True),
        ("'--'", False),
        ("a -- b", False),
    ],
)
def test_comments_are_blank(text: str, blank: bool) -> None:
    assert is_blank(text) == blank


def asked(*lines: str) -> list[str]:
    statements: list[str] = []
    run_script(Session(statements.append, DEFINITIONS), lines)
    return statements


def test_a_statement_takes_as_many_lines_as_it_needs() -> None:
    assert asked("SELECT\n", "  1;  SELECT\n", "2\n", ";\n") == ["SELECT\n  1", "SELECT\n2"]


def test_the_last_statement_of_a_file_needs_no_semicolon() -> None:
    assert asked("SELECT 1;\n", "SELECT 2 -- the end\n") == ["SELECT 1", "SELECT 2 -- the end\n"]


@pytest.mark.parametrize("word", [".quit", ".exit", "quit", "exit;", "  QUIT ;"])
def test_nothing_is_answered_after_quit(word: str) -> None:
    assert asked("SELECT 1;", word, "SELECT 2;") == ["SELECT 1"]


def test_a_dot_within_a_statement_is_no_command() -> None:
    assert asked("SELECT 1\n", ".quit\n", ";\n", "-- a comment\n", ".quit\n", "SELECT 2;\n") == ["SELECT 1\n.quit"]


def test_tables_and_schema(capsys: pytest.CaptureFixture[str]) -> None:
    asked(".tables", ".schema EXPORTS", ".help")
    shown = capsys.readouterr().out.splitlines()
    assert shown[:3] == ["runs", "exports", "CREATE TABLE exports;"]
    assert any(line.startswith(".schema [NAME]") for line in shown[3:])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (".tabels", r"no command '\.tabels'; did you mean 'tables'\?"),
        (".", r"no command '\.'; \.help"),
        (".schema run", "no table or view 'run'; did you mean 'runs'"),
    ],
)
def test_a_wrong_command_says_what_is_right(line: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        asked(line)


@pytest.mark.parametrize("lines", [(), ("\n", "  \n")])
def test_nothing_at_all_is_an_error(lines: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError, match="no query; give one"):
        asked(*lines)


def test_a_file_ends_at_its_first_error() -> None:
    statements: list[str] = []

    def answer(statement: str) -> None:
        statements.append(statement)
        raise StoreError("no")

    with pytest.raises(StoreError):
        run_script(Session(answer, DEFINITIONS), ["one;\n", "two;\n"])
    assert statements == ["one"]
