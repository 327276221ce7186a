"""The command `report`: what runs have measured, as one HTML page and as pictures. Computes nothing of a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from blockpruner.errors import ConfigurationError
from flows import cli_options as options
from flows.cli_warning import warn
from flows.completion import complete_run

Runs = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...", help="Ids, the starts of some, names, or latest; one or several.", autocompletion=complete_run
    ),
]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FILE", parser=options.folder, help="The page to write (.html).")
]
Open = Annotated[bool, typer.Option("--open", help="Open the page in the browser.")]
Figures = Annotated[
    Path | None,
    typer.Option(
        "--figures",
        metavar="DIR",
        parser=options.folder,
        help="Write every picture here as well, as PNG and SVG; needs a Chromium or Chrome.",
    ),
]


def report(
    run: Runs,
    output: Output = Path("report.html"),
    open_page: Open = False,
    figures: Figures = None,
    workspace: options.WorkspaceFolder = options.DEFAULT_WORKSPACE,
    as_json: options.Json = False,
) -> None:
    """Make a page of tables and pictures from one run or several.

    One HTML file that needs nothing else and fetches nothing. What other runs measured of the same exported model is in
    it as well.
    """
    _require_page(output)
    if figures is not None:
        from flows.report.pictures import require_browser

        _require_folder(figures)
        require_browser()
    from flows.cli_output import put
    from flows.report.build import Report
    from flows.report.related import with_related
    from flows.summary import RunSummary, dump_json
    from stages.runs import RunStore

    store = RunStore(workspace, warn)
    store.workspace.require()
    chosen, every = [store.resolve(name) for name in run], store.list()
    summaries = [RunSummary.of(with_related(record, every), store.workspace, warn, alone=record) for record in chosen]
    made = Report.of(summaries)
    made.write(output)
    drawn = list[Path]()
    if figures is not None:
        from flows.report.pictures import write_pictures

        drawn = write_pictures(made.pictures, figures)
    paths = [output, *drawn]
    put(
        dump_json({"report": str(output.resolve()), "figures": [str(path.resolve()) for path in drawn]})
        if as_json
        else "\n".join(map(str, paths))
    )
    if open_page:
        _open(output)


def _require_page(output: Path) -> None:
    """Refuse what can be no page, before anything is read.

    Raises:
        ConfigurationError: saying what is wrong with it.
    """
    from flows.report.place import PAGE_SUFFIXES

    if output.suffix.lower() not in PAGE_SUFFIXES:
        raise ConfigurationError(f"--output is {output}, which does not end in .html; give the page a name that does")
    if output.is_dir():
        raise ConfigurationError(f"{output} is a folder; give --output a file")
    _require_writable(output.absolute().parent, "--output")


def _require_folder(figures: Path) -> None:
    if figures.exists() and not figures.is_dir():
        raise ConfigurationError(f"{figures} is a file; give --figures a folder")
    _require_writable(
        next(path for path in (figures.absolute(), *figures.absolute().parents) if path.exists()), "--figures"
    )


def _require_writable(folder: Path, option: str) -> None:
    if not folder.is_dir():
        raise ConfigurationError(f"the folder {folder} is not there; make it, or give {option} another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigurationError(f"the folder {folder} cannot be written; give {option} another")


def _open(page: Path) -> None:
    import webbrowser

    if not webbrowser.open(page.resolve().as_uri()):
        warn(f"no browser could be started; open {page} yourself")
