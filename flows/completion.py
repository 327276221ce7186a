"""What the shell offers after a tab. Looks at names of files only, so that it answers at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import typer

Completion = Callable[[str], list[str]]
_TEXTS = ("alpaca", "wikitext2", "c4", "ptb")
_TEXT_SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")


def complete_choice(*choices: str) -> Completion:
    """Offers a fixed set of values."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return complete


def complete_text(incomplete: str) -> list[str]:
    """Offers the named texts, and files of text."""
    named = [name for name in _TEXTS if name.startswith(incomplete)]
    return named + _files(incomplete, _TEXT_SUFFIXES)


def complete_recipe(incomplete: str) -> list[str]:
    """Offers the project's recipes, and YAML files."""
    own = [path.stem for path in (Path(__file__).parent / "recipes").glob("*.yaml")]
    return [name for name in sorted(own) if name.startswith(incomplete)] + _files(incomplete, (".yaml", ".yml"))


def complete_comparison(incomplete: str) -> list[str]:
    """Offers the project's comparisons, and YAML files."""
    own = [path.stem for path in (Path(__file__).parent / "recipes" / "compare").glob("*.yaml")]
    return [name for name in sorted(own) if name.startswith(incomplete)] + _files(incomplete, (".yaml", ".yml"))


def complete_run(ctx: typer.Context, incomplete: str) -> list[str]:
    """Offers the ids of the workspace's runs, newest first."""
    folder = Path(ctx.params.get("workspace") or os.environ.get("BLOCKPRUNER_WORKSPACE") or "data")
    run_ids = sorted((path.stem for path in (folder / "runs").glob("[!.]*.json")), reverse=True)
    return [run_id for run_id in [*run_ids, "latest"] if run_id.startswith(incomplete)]


def _files(incomplete: str, suffixes: tuple[str, ...]) -> list[str]:
    folder, _, start = incomplete.rpartition("/")
    entries = Path(folder + "/" if incomplete.startswith("/") else folder or ".").glob("*")
    offered = (entry for entry in entries if entry.is_dir() or entry.suffix in suffixes)
    shown = [entry for entry in offered if entry.name.startswith(start)]
    return sorted(f"{folder}/{entry.name}" if folder or incomplete.startswith("/") else entry.name for entry in shown)
