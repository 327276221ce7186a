"""Ten kills over the whole pipeline; `python -m tests.integration.pipeline_kills` for more, with Prefect."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tests.integration.file_changes import die_before_change
from tests.integration.loaded_processes import Command, commands, pipeline
from tests.integration.pipeline_kills import Call, campaign, prepare

NUM_KILLS = 10


def use_for_temporary_files(folder: str) -> None:
    os.environ["TMPDIR"] = tempfile.tempdir = folder


def test_ten_kills_lose_nothing(tmp_path: Path) -> None:
    fields = prepare(tmp_path)
    (tmp_path / "tmp").mkdir()
    with commands() as noted:

        def launch(workspace: Path, said: Path, change: int) -> Call:
            before = [
                (use_for_temporary_files, [str(tmp_path / "tmp")]),
                (die_before_change, [change, str(workspace), str(said / "changes")]),
            ]
            return noted(Command([workspace, "evaluate", fields], said, before, program=pipeline))

        fell = campaign(launch, tmp_path, NUM_KILLS, seed=1)
    assert fell.total() == NUM_KILLS
    assert len(fell) > 2, fell  # they did not all fall in one place
    assert list((tmp_path / "tmp").iterdir()) == []
