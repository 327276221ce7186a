"""What a worker says of a cell, in this process."""

from __future__ import annotations

from pathlib import Path

from flows.cell_worker import Request, _carry_out
from flows.recipe import make_recipe
from flows.reporter import Reporter
from stages.runs import RunDescription, RunStore


def test_a_cell_that_fails_before_its_run_begins_has_not_the_run_of_the_cell_before(tmp_path: Path) -> None:
    runs = RunStore(tmp_path)
    before = runs.create(RunDescription(name="c: a", comparison="c", model="a"))
    runs.finish(before, "completed")
    recipe = make_recipe({"model": str(tmp_path / "nowhere"), "ratio": 0.2, "name": "c: b"})
    request = Request(recipe=recipe, goal="evaluate", comparison="c")
    event = _carry_out(tmp_path, request, Reporter())
    assert event.run_id != before.run_id
    assert event.text is not None
    assert "nowhere" in event.text
    assert runs.load(before.run_id).status == "completed"


def test_a_workspace_that_cannot_be_opened_fails_the_cell_and_not_the_worker(tmp_path: Path) -> None:
    (tmp_path / "ws").write_text("a file where the folder should be")
    recipe = make_recipe({"model": "m", "ratio": 0.2, "name": "c: b"})
    request = Request(recipe=recipe, goal="evaluate", comparison="c")
    event = _carry_out(tmp_path / "ws", request, Reporter())
    assert (event.kind, event.run_id) == ("end", None)
    assert "cannot be written" in event.text
