"""The commands that look at what runs have left: `runs`, `show` and `sql`. They compute nothing and import no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockpruner.errors import ConfigurationError, StoreError
from flows import cli_options as options
from flows.cli_warning import warn
from flows.wording import one_line

if TYPE_CHECKING:
    from stages.runs import RunStore
    from stages.store import QueryResult, ResultStore

Query = Annotated[
    str | None,
    typer.Argument(
        metavar="[QUERY]", help='For example "FROM leaderboard". Without one: a prompt, or what standard input holds.'
    ),
]


def runs(
    workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE,
    as_json: options.Json = False,
    as_csv: options.Csv = False,
) -> None:
    """List the runs, newest first."""
    from flows.cli_output import put, put_view
    from flows.render import runs_table
    from flows.summary import dump_json
    from flows.table_formats import csv_text

    _one_format(as_json, as_csv)
    records = open_runs(workspace).list()
    listed = [record.model_dump(mode="json", exclude={"stages", "config"}) for record in records]
    if as_json:
        put(dump_json(listed))
    elif as_csv:
        columns = list(listed[0]) if listed else ["run_id"]
        put(csv_text(columns, [list(row.values()) for row in listed]), newline=False)
    elif not records:
        typer.echo(one_line(f"no runs in {workspace} yet; `blockpruner demo` makes one"), err=True)
    else:
        put_view(runs_table(records))


def show(
    run: options.Run,
    workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE,
    as_json: options.Json = False,
    as_csv: options.Csv = False,
    as_markdown: options.Markdown = False,
    as_latex: options.Latex = False,
) -> None:
    """Show one run.

    What was removed, what it cost, and where the model is. As CSV, Markdown or LaTeX: the measurements, dense beside
    pruned; as JSON: everything.
    """
    from flows.cli_output import print_result, put
    from flows.results_table import results_table
    from flows.summary import RunSummary
    from flows.table_formats import chosen_format, formatted

    form = chosen_format(as_json=as_json, as_csv=as_csv, as_markdown=as_markdown, as_latex=as_latex)
    store = open_runs(workspace)
    summary = RunSummary.of(store.resolve(run), store.workspace, warn)
    if form is None or form == "json":
        print_result(summary, as_json=as_json)
    else:
        put(formatted(results_table(summary), form))


def sql(
    query: Query = None,
    workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE,
    as_json: options.Json = False,
    as_csv: options.Csv = False,
) -> None:
    """Ask the results database in SQL; without a query at a prompt.

    Reads only, and works while a search is running. A terminal shows what fits its width: long values are cut, and
    columns in the middle left out; --json, --csv and a pipe give everything.
    """
    from stages.store import ResultStore

    _one_format(as_json, as_csv)
    store = open_runs(workspace)
    results = ResultStore(store.workspace.database, warn)
    if query is not None:
        _put_answer(results.query(query), as_json, as_csv)
    else:
        _ask_for_queries(results, lambda each: _put_answer(results.query(each), as_json, as_csv))


def _put_answer(answer: QueryResult, as_json: bool, as_csv: bool) -> None:
    from flows.cli_output import put, put_view
    from flows.render import Answer
    from flows.summary import dump_json, finite
    from flows.table_formats import csv_text

    columns, rows = answer
    if as_json:
        put(dump_json([dict(zip(columns, map(finite, row), strict=True)) for row in rows]))
    elif as_csv:
        put(csv_text(columns, rows), newline=False)
    else:
        put_view(Answer(columns, rows))


def _ask_for_queries(results: ResultStore, answer: Callable[[str], None]) -> None:
    """At a prompt in a terminal; else from standard input."""
    from flows.sql_prompt import Session, converse, run_script
    from stages.store_schema import DEFINITIONS

    session = Session(answer, DEFINITIONS)
    if not sys.stdin.isatty():
        run_script(session, sys.stdin)
        return
    try:
        names = results.names()
    except StoreError:  # the first query will say it
        names = []
    converse(session, names, f"{results.path}, for reading. A statement ends with a semicolon; .help lists commands.")


def open_runs(workspace: Path) -> RunStore:
    """The workspace's runs; those whose process died are closed first, here and in the database.

    A workspace that is not there is an error for every command that looks at one: a misspelt folder must not look like
    one in which nothing has run. One that is there without runs is none for `runs`, whose answer is an empty list.
    """
    from stages.runs import RunStore

    store = RunStore(workspace, warn)
    store.workspace.require()
    if closed := store.close_dead():
        from stages.store import ResultStore

        ResultStore(store.workspace.database, warn, wait=1.0).ingest(closed[-1])
    return store


def _one_format(as_json: bool, as_csv: bool) -> None:
    if as_json and as_csv:
        raise ConfigurationError("both --json and --csv are given; give one of them")
