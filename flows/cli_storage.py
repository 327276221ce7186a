"""The commands that look after what a workspace keeps: `cache list`, `cache prune` and `db rebuild`.

They know no file and no table: `stages.cache` says what can go, `stages.store` makes the database.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockpruner.errors import ConfigurationError
from blockpruner.memory_size import parse_memory_size
from blockpruner.paths import shortened
from flows import cli_options as options
from flows.cli_warning import warn
from flows.completion import complete_run
from flows.wording import count, one_line, size

if TYPE_CHECKING:
    from stages.cache import CacheEntry, Freeing
    from stages.runs import RunStore

_AGE_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
_MOST_DAYS = 36_500


def age(text: str) -> timedelta:
    """An age as people write it: '12h', '30d', '2w'.

    Raises:
        ConfigurationError: if it is none.
    """
    match = re.fullmatch(r"\s*(\d{1,7})\s*([hdw])\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigurationError(f"{shortened(repr(text))} is no age; write a number and a unit, as 12h, 30d or 2w")
    return min(int(match[1]) * _AGE_UNITS[match[2].lower()], timedelta(days=_MOST_DAYS))


def size_in_bytes(text: str) -> int:
    """A size as people write it: '50GB', '512MiB'.

    Raises:
        ConfigurationError: if it is none.
    """
    try:
        return parse_memory_size(text)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"{shortened(repr(text))} is no size; write a number and a unit, as 50GB or 512MiB"
        ) from error


_RUN_HELP = "An id, the start of one, a name, or latest; may be given several times."
ShownRuns = Annotated[
    list[str] | None,
    typer.Option("--run", metavar="RUN", help=f"What this run needs. {_RUN_HELP}", autocompletion=complete_run),
]
ShownOlderThan = Annotated[
    timedelta | None,
    typer.Option("--older-than", metavar="AGE", parser=age, help="What was last used longer ago: 12h, 30d, 2w."),
]
LargerThan = Annotated[
    int | None, typer.Option("--larger-than", metavar="SIZE", parser=size_in_bytes, help="What is larger: 500MB, 2GiB.")
]
Unused = Annotated[bool, typer.Option("--unused", help="What no run needs: all that a bare prune frees.")]
GivenUpRuns = Annotated[
    list[str] | None,
    typer.Option("--run", metavar="RUN", help=f"Keep this run no longer. {_RUN_HELP}", autocompletion=complete_run),
]
OlderThan = Annotated[
    timedelta | None,
    typer.Option("--older-than", metavar="AGE", parser=age, help="Keep no runs that ended longer ago: 12h, 30d, 2w."),
]
MaxSize = Annotated[
    int | None,
    typer.Option(
        "--max-size",
        metavar="SIZE",
        parser=size_in_bytes,
        help="Keep no more than this, as 50GB: the oldest runs go first.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def _help_alone(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


cache = typer.Typer(
    help="List and free what the stages have computed.", callback=_help_alone, invoke_without_command=True
)
db = typer.Typer(help="Look after the results database.", callback=_help_alone, invoke_without_command=True)


@cache.command("list", cls=options.Command)
@cache.command("ls", cls=options.Command, hidden=True)
def list_(
    run: ShownRuns = None,
    older_than: ShownOlderThan = None,
    larger_than: LargerThan = None,
    unused: Unused = False,
    workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE,
    as_json: options.Json = False,
    as_csv: options.Csv = False,
) -> None:
    """List artifacts and checkpoints, the largest first.

    With their size, when they were last used, and how many runs need them.
    """
    from flows.cli_output import put, put_view
    from flows.render import query_table
    from flows.summary import dump_json
    from flows.table_formats import csv_text
    from stages.cache import ArtifactCache

    if as_json and as_csv:
        raise ConfigurationError("both --json and --csv are given; give one of them")
    runs = _open_runs(workspace)
    wanted = {runs.resolve(each).run_id for each in run or ()}
    before = datetime.now(UTC) - older_than if older_than is not None else None
    listed = [
        entry
        for entry in ArtifactCache(runs).entries()
        if (not wanted or wanted.intersection(entry.runs))
        and (before is None or entry.last_used < before)
        and (larger_than is None or entry.bytes > larger_than)
        and not (unused and entry.runs)
    ]
    rows = [_as_json(entry, runs) for entry in listed]
    if as_json:
        put(dump_json(rows))
    elif as_csv:
        columns = ["kind", "stage", "fingerprint", "path", "bytes", "last_used", "runs"]
        cells = [[" ".join(v) if isinstance(v, list) else v for v in row.values()] for row in rows]
        put(csv_text(columns, cells), newline=False)
    else:
        put_view(query_table(_COLUMNS, [_cells(entry) for entry in listed]))
        total = sum(entry.bytes for entry in listed)
        typer.echo(one_line(f"{size(total)} in {count(len(listed), 'folder')} of {runs.workspace.path}"), err=True)


@cache.command(cls=options.Command)
def prune(
    run: GivenUpRuns = None,
    older_than: OlderThan = None,
    max_size: MaxSize = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE,
    as_json: options.Json = False,
) -> None:
    """Free what no kept run needs.

    A run is kept as long as its record is there. Without options only what no run needs goes. Options say which runs
    are kept no longer: their records and their rows in the database go, and then what only they needed. A run that is
    under way is always kept. Asks before it removes anything.
    """
    from flows.cli_output import put
    from flows.summary import dump_json
    from stages.cache import ArtifactCache, Freeing
    from stages.store import ResultStore

    runs = _open_runs(workspace)
    cached = ArtifactCache(runs)
    before = datetime.now(UTC) - older_than if older_than is not None else None
    plan = cached.plan([runs.resolve(each) for each in run or ()], before, max_size)
    nothing = not (plan.runs or plan.entries)
    if not as_json and not nothing:
        _put_plan(plan)
    if dry_run or nothing:
        done = plan
    elif yes or _agreed(plan):
        results = ResultStore(runs.workspace.database, warn)
        done = cached.free(plan, results.forget)
    else:
        done = Freeing(kept_bytes=plan.kept_bytes + plan.bytes)
    if as_json:
        put(dump_json(_freed_json(done, dry_run, runs)))
    else:
        _put_end(done, dry_run, max_size)


@db.command(cls=options.Command)
def rebuild(workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE, as_json: options.Json = False) -> None:
    """Make the database anew.

    From the run records and the artifacts alone; what was in it is not looked at.
    """
    from flows.cli_output import put
    from flows.summary import dump_json
    from stages.store import ResultStore

    runs = _open_runs(workspace)
    number = ResultStore(runs.workspace.database, warn).rebuild()
    if as_json:
        put(dump_json({"database": str(runs.workspace.database), "runs": number}))
    else:
        put(f"{runs.workspace.database} made anew from {count(number, 'run record')} and their artifacts")


_COLUMNS = ("kind", "stage", "fingerprint", "size", "last used", "runs")


def _cells(entry: CacheEntry) -> list[object]:
    used = entry.last_used.astimezone().strftime("%Y-%m-%d %H:%M")
    return [entry.kind, entry.stage, entry.fingerprint[:12], size(entry.bytes), used, _needed_by(entry.runs)]


def _needed_by(run_ids: Sequence[str]) -> str:
    if not run_ids:
        return "none"
    return run_ids[0] + (f" and {len(run_ids) - 1} more" if len(run_ids) > 1 else "")


def _as_json(entry: CacheEntry, runs: RunStore) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "stage": entry.stage,
        "fingerprint": entry.fingerprint,
        "path": entry.path.relative_to(runs.workspace.path).as_posix(),
        "bytes": entry.bytes,
        "last_used": entry.last_used.isoformat(timespec="seconds"),
        "runs": list(entry.runs),
    }


def _freed_json(done: Freeing, dry_run: bool, runs: RunStore) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "runs": [record.run_id for record in done.runs],
        "entries": [_as_json(entry, runs) for entry in done.entries],
        "bytes": done.bytes,
        "left": [_as_json(entry, runs) for entry in done.left],
        "kept_bytes": done.kept_bytes,
    }


def _put_plan(plan: Freeing) -> None:
    from flows.cli_output import put_view
    from flows.render import query_table, runs_table

    if plan.runs:
        put_view(runs_table(plan.runs))
        typer.echo("", err=True)
    if plan.entries:
        put_view(query_table(_COLUMNS, [_cells(entry) for entry in plan.entries]))


def _agreed(plan: Freeing) -> bool:
    """Ask.

    Raises:
        ConfigurationError: if nobody is there to answer.
    """
    records = f" and forget {count(len(plan.runs), 'run')}" if plan.runs else ""
    try:
        return typer.confirm(f"Free {size(plan.bytes)} in {count(len(plan.entries), 'folder')}{records}?", err=True)
    except typer.Abort as error:
        typer.echo("", err=True)
        raise ConfigurationError("no answer, so nothing is removed; give --yes, or --dry-run to look only") from error


def _put_end(done: Freeing, dry_run: bool, max_size: int | None) -> None:
    from flows.cli_output import put

    for entry in done.left:
        warn(f"{entry.stage}/{entry.fingerprint[:12]} is left: another process is writing it, or a run needs it now")
    if dry_run:
        put(f"would free {size(done.bytes)}; {size(done.kept_bytes)} would stay")
    elif not (done.runs or done.entries):
        put(f"nothing was freed; {size(done.kept_bytes)} stay")
    else:
        put(f"freed {size(done.bytes)}; {size(done.kept_bytes)} stay")
    if max_size is not None and done.kept_bytes > max_size:
        warn(f"that is more than {size(max_size)}: the rest is needed by runs that are under way")


def _open_runs(workspace: Path) -> RunStore:
    """The workspace's runs; those whose process died are closed first."""
    from stages.runs import RunStore

    store = RunStore(workspace, warn)
    store.workspace.require()
    store.close_dead()
    return store
