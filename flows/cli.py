"""The command line `blockpruner`: the commands by name. Imports nothing heavy; a command imports what it needs."""

from __future__ import annotations

from typing import Annotated

import typer

import blockpruner
from flows.boundary import OneLineErrors
from flows.cli_compare import compare
from flows.cli_options import Command
from flows.cli_pipeline import demo, run
from flows.cli_report import report
from flows.cli_results import runs, show, sql
from flows.cli_resume import resume
from flows.cli_stages import baseline, calibrate, evaluate, export, search, speed
from flows.cli_storage import cache, db

app = typer.Typer(
    cls=OneLineErrors,
    name="blockpruner",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def main(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Find the residual blocks that a large language model can do without, remove them, and measure what was lost."""
    if version:
        typer.echo(f"blockpruner {blockpruner.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _command in (
    *(demo, run, resume, compare, calibrate, baseline, search, export, evaluate, speed),
    *(runs, show, sql, report),
):
    app.command(cls=Command)(_command)

app.add_typer(cache, name="cache")
app.add_typer(db, name="db")
