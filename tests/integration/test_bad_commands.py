"""Command lines that are wrong, for every command: status 2, one line, and the workspace as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from flows.cli import app
from flows.reporter import LOADING
from tests.integration.bad_input_commands import LINES
from tests.integration.bad_input_lab import Lab, refused
from tests.integration.command_line import Outcome, blockpruner, in_a_process
from tests.tiny_models import tiny_rows

TinyFolder = Callable[[str], Path]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_folder: TinyFolder) -> Lab:
    folder = tmp_path_factory.mktemp("commands")
    shutil.copytree(tiny_folder("llama"), folder / "model")
    (folder / "cal.txt").write_text("\n".join(tiny_rows(40)))
    made = Lab(folder, folder / "ws")
    assert made.search().status == 0
    return made


def files(lab: Lab) -> set[Path]:
    """All but the records of runs that were refused, their locks, and the database that lists them."""
    kept = {path for path in lab.path.rglob("*") if path.is_file()}
    return {path for path in kept if path.parent.name not in ("runs", "locks", "ws")}


@pytest.mark.parametrize(("words", "said"), LINES)
def test_a_wrong_command_line(words: tuple[str, ...], said: str, lab: Lab) -> None:
    places = {"{model}": str(lab.model), "{text}": str(lab.path / "cal.txt"), "{folder}": str(lab.path)}
    for place, path in places.items():
        words = tuple(word.replace(place, path) for word in words)
    before = files(lab)
    known = words[0] in names(app)
    assert said in refused(lab.call(*words) if known else blockpruner(*words))
    assert files(lab) == before


def test_the_search_before_is_still_there(lab: Lab) -> None:
    assert all(stage["cached"] for stage in lab.search("--json").json["stages"])


def names(application: typer.Typer) -> list[str]:
    commands = [each.name or getattr(each.callback, "__name__", "") for each in application.registered_commands]
    return [*commands, *(str(group.name) for group in application.registered_groups)]


def test_every_command_is_tried_and_explains_itself() -> None:
    assert {words[0] for words, _ in LINES} >= set(names(app))
    for name in names(app):
        outcome = blockpruner(name, "--help")
        assert outcome.status == 0
        assert outcome.stdout.startswith(f"Usage: blockpruner {name}")


@pytest.mark.parametrize(
    ("name", "value", "command", "said"),
    [
        ("BLOCKPRUNER_WORKSPACE", "/etc/passwd", "runs", "/etc/passwd is a file"),
        ("BLOCKPRUNER_WORKSPACE", "~nobody-here/x", "runs", "the home folder of a user who is not known here"),
        ("BLOCKPRUNER_WORKSPACE", "gone\x1b[2J", "show latest", r"gone\x1b[2J is not there"),
        ("PREFECT_LOGGING_LEVEL", "loud", "run --num-blocks 1", "PREFECT_LOGGING_LEVEL is 'LOUD'"),
        ("PREFECT_PROFILE", "lokal", "run --num-blocks 1", "PREFECT_PROFILE is 'lokal', and there is no such profile"),
        ("PREFECT_HOME", "{folder}", "run --num-blocks 1", "profiles.toml cannot be read: "),
        (
            "PREFECT_API_URL",
            "http://127.0.0.1:9/api",
            "run --num-blocks 1",
            "Failed to reach API at http://127.0.0.1:9",
        ),
        (
            "PREFECT_API_DATABASE_CONNECTION_URL",
            "bad",
            "run --num-blocks 1",
            "cannot be started (sqlalchemy.exc.ArgumentError: Could not parse SQLAlchemy URL",
        ),
        ("PREFECT_API_URL", "127.0.0.1:9", "compare {folder}/c.yaml", "missing an 'http://' or 'https://' protocol"),
    ],
)
def test_an_environment_that_is_wrong(name: str, value: str, command: str, said: str, lab: Lab) -> None:
    given = lab.good if command.startswith("run ") else []
    workspace = [] if name == "BLOCKPRUNER_WORKSPACE" else ["--workspace", lab.workspace]
    (lab.path / "profiles.toml").write_text("no toml [")
    grid = f"grid: {{model: {lab.model}, calibration: {lab.path}/cal.txt, num_samples: all, num_blocks: 1}}"
    (lab.path / "c.yaml").write_text(f"base: {{sequence_length: 16}}\n{grid}\n")
    words = [word.replace("{folder}", str(lab.path)) for word in (*command.split(), value)]
    outcome: Outcome = in_a_process(*words[:-1], *given, *workspace, **{name: words[-1]})
    assert said in refused(outcome)
    waited_for = [f"{LOADING} ...", "starting Prefect ..."]
    assert outcome.stderr.splitlines()[:-1] == [line for line in waited_for if name.startswith("PREFECT")]
