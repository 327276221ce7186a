"""Recipes and comparisons that are wrong: every field, every way to write a file. Status 2, one line, and no run."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.grid import Comparison, External
from flows.recipe import Recipe
from tests.integration.bad_input_lab import refused
from tests.integration.bad_input_recipes import COMPARISONS, CONTRADICTIONS, FIELDS, FILES
from tests.integration.command_line import blockpruner


@pytest.fixture(scope="module")
def model(tiny_folder: object) -> Path:
    assert callable(tiny_folder)
    return Path(tiny_folder("llama"))


def run(folder: Path, content: bytes | str, command: str = "run") -> str:
    """The one line that refuses the file."""
    path = folder / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = set(folder.rglob("*"))
    line = refused(blockpruner(command, path, "--workspace", folder / "ws"))
    new = {item for item in folder.rglob("*") if item.is_file() and item.parent != folder / "ws/locks"} - before
    assert {item.parent.name for item in new} <= {"runs", "ws"}, new  # the record of a run that was refused, at most
    return line


@pytest.mark.parametrize(("field", "value", "said"), [(f, v, s) for f, cases in FIELDS.items() for v, s in cases])
def test_a_value_that_a_field_cannot_have(field: str, value: str, said: str, model: Path, tmp_path: Path) -> None:
    good = {"model": str(model), "calibration": "nowhere.txt", "num_blocks": "1", field: value}
    if field == "ratio":
        del good["num_blocks"]
    assert said in run(tmp_path, "".join(f"{name}: {text}\n" for name, text in good.items()))


@pytest.mark.parametrize(("lines", "said"), CONTRADICTIONS)
def test_what_contradicts_itself(lines: str, said: str, model: Path, tmp_path: Path) -> None:
    assert said in run(tmp_path, f"model: {model}\nnum_blocks: 1\n{lines}\n")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, said = FILES[name]
    monkeypatch.chdir(tmp_path)
    for command in ("run", "compare"):
        assert said in run(tmp_path, content, command)


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_that_is_none(name: str, model: Path, tmp_path: Path) -> None:
    lines, said = COMPARISONS[name]
    base = "" if "base" in name else f"base: {{model: {model}}}\n"
    assert said in run(tmp_path, f"{base}{lines}\n", "compare")


def test_every_field_has_its_cases() -> None:
    assert FIELDS.keys() == Recipe.model_fields.keys()
    written = " ".join(lines for lines, _ in COMPARISONS.values())
    assert all(f"{name}:" in written for name in (*Comparison.model_fields, *External.model_fields))
