"""Ten kills over the whole pipeline, and six where it is timed; `pipeline_kills.py` does more, with Prefect."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.integration.file_changes import die_before_change
from tests.integration.loaded_processes import Command, commands, pipeline
from tests.integration.pipeline_kills import SPEED, Call, campaign, prepare

NUM_KILLS = {"evaluate": 10, "speed": 6}
"""By how far the pipeline goes."""


def use_for_temporary_files(folder: str) -> None:
    os.environ["TMPDIR"] = tempfile.tempdir = folder


@pytest.mark.parametrize("goal", NUM_KILLS)
def test_kills_lose_nothing(goal: str, tmp_path: Path) -> None:
    fields = prepare(tmp_path) | {f"speed_{name}": value for name, value in SPEED.items()}
    (tmp_path / "tmp").mkdir()
    with commands() as noted:

        def launch(workspace: Path, said: Path, change: int) -> Call:
            before = [
                (use_for_temporary_files, [str(tmp_path / "tmp")]),
                (die_before_change, [change, str(workspace), str(said / "changes")]),
            ]
            return noted(Command([workspace, goal, fields], said, before, program=pipeline))

        fell = campaign(launch, tmp_path, NUM_KILLS[goal], seed=1)
    assert fell.total() == NUM_KILLS[goal]
    assert len(fell) > NUM_KILLS[goal] // 4, fell  # they did not all fall in one place
    assert list((tmp_path / "tmp").iterdir()) == []
