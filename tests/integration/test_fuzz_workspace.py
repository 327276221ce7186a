"""A workspace's own files spoiled by chance: what a command answers is right, or it refuses in one line.

Artifacts and checkpoints carry digests, so a changed one is noticed, said, set aside and computed again. One whose
digests were made anew is somebody else's work: it may say what it likes, and breaks no command.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockpruner.journal import SearchJournal
from tests.integration.bad_input_lab import Lab, little_memory
from tests.integration.fuzz_lab import FACTOR, done_or_refused, fuzz, spoiled_bytes, spoiled_json
from tests.integration.pipeline_kills import content_of
from tests.integration.test_foreign_files import signed
from tests.tiny_models import tiny_rows

TinyFolder = Callable[[str], Path]
pytestmark = [pytest.mark.timeout(300 * FACTOR)]

SEARCH = ("--num-blocks", 3)
READERS: tuple[tuple[object, ...], ...] = (
    ("show", "latest"),
    ("show", "latest", "--csv"),
    ("report", "latest", "--output", "PAGE"),
    ("cache", "list"),
    ("db", "rebuild"),
    ("search", *SEARCH),
)
"""What reads artifacts and computes little."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_folder: TinyFolder) -> Lab:
    """A workspace with a whole run."""
    folder = tmp_path_factory.mktemp("fuzz-workspace")
    shutil.copytree(tiny_folder("llama"), folder / "model")
    (folder / "cal.txt").write_text("\n".join(tiny_rows(12)))
    (folder / "eval.txt").write_text("\n".join(tiny_rows(12, seed=1)))
    made = Lab(folder, folder / "ws")
    assert made.call("evaluate", *made.good, *SEARCH, "--eval-text", folder / "eval.txt").status == 0
    return made


@pytest.fixture(scope="module")
def used(lab: Lab) -> list[str]:
    """The artifacts that a search takes from there."""
    found = cached_by(lab)
    assert list(found.values()) == [True, True]
    return sorted(found)


@pytest.fixture(scope="module")
def stopped(lab: Lab) -> Lab:
    """A workspace in which a search was stopped in its third step, after it had kept some scores twice."""
    kept = 0

    def keep_and_stop(self: SearchJournal, removed: Any, table: Any) -> None:
        nonlocal kept
        self._partial_saved_at = float("-inf")
        keep(self, removed, table)
        kept += len(removed) == 2
        if kept == 2:
            raise KeyboardInterrupt

    keep = SearchJournal.save_partial
    made = Lab(lab.path, lab.path / "stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SearchJournal, "save_partial", keep_and_stop)
        assert made.search(*SEARCH, "--batch-size", 1).status == 130
    (state,) = made.workspace.glob("state/search/*")
    names = {"dense.safetensors", "plan.json", "partial.safetensors", "partial-previous.safetensors"}
    assert {path.name for path in state.iterdir()} == {*names, "step-0001.json", "step-0002.json"}
    return made


@pytest.fixture(autouse=True)
def _a_sound_machine() -> object:
    with little_memory():
        yield


def copy_of(lab: Lab) -> Lab:
    copy = Lab(lab.path, lab.path / "spoiled")
    shutil.rmtree(copy.workspace, ignore_errors=True)
    shutil.copytree(lab.workspace, copy.workspace)
    return copy


def spoil(data: st.DataObject, file: Path) -> bool:
    """Change the file, if the change drawn is one."""
    good = file.read_bytes()
    ways = ["bytes", *(["json"] if file.suffix == ".json" else []), *(["payload"] * 3 if "step-" in file.name else [])]
    match data.draw(st.sampled_from(ways)):
        case "bytes":
            file.write_bytes(data.draw(spoiled_bytes(good)))
        case "json":
            file.write_bytes(data.draw(spoiled_json(good)))
        case _:  # a step that could be one, under the old digest
            sealed = json.loads(good)
            sealed["payload"] = data.draw(spoiled_json(sealed["payload"].encode())).decode()
            file.write_text(json.dumps(sealed))
    return file.read_bytes() != good


def trace_of(lab: Lab) -> Any:
    """What the search found, without timings."""
    (artifact,) = lab.workspace.glob("artifacts/search/*")
    return {name: content_of(artifact / name) for name in ("search.json", "trace.jsonl")}


def cached_by(lab: Lab) -> dict[str, bool]:
    """The artifacts of the search, by their paths in the workspace, and whether it found them there."""
    return {stage["artifact_path"]: stage["cached"] for stage in lab.search(*SEARCH, "--json").json["stages"]}


def files_of(lab: Lab, pattern: str) -> list[Path]:
    return sorted(path for path in lab.workspace.glob(pattern) if path.is_file())


@fuzz(40)
@given(data=st.data())
def test_changed_artifacts_are_computed_again(data: st.DataObject, lab: Lab, used: list[str]) -> None:
    copy = copy_of(lab)
    artifact = data.draw(st.sampled_from(used))
    changed = spoil(data, data.draw(st.sampled_from(files_of(copy, f"{artifact}/*"))))
    assert cached_by(copy) == {path: path != artifact or not changed for path in used}
    assert trace_of(copy) == trace_of(lab)


@fuzz(40)
@given(data=st.data())
def test_readers_of_changed_artifacts(data: st.DataObject, lab: Lab) -> None:
    copy = copy_of(lab)
    spoil(data, data.draw(st.sampled_from(files_of(copy, "artifacts/**/*"))))
    done_or_refused(call(copy, data.draw(st.sampled_from(READERS))))


@fuzz(60)
@given(data=st.data())
def test_artifacts_of_others(data: st.DataObject, lab: Lab) -> None:
    copy = copy_of(lab)
    file = data.draw(st.sampled_from(files_of(copy, "artifacts/**/*")))
    spoil(data, file)
    artifact = copy.workspace.joinpath(*file.relative_to(copy.workspace).parts[:3])
    with suppress(ValueError, TypeError, KeyError):  # of what is no manifest any more
        signed(artifact)
    done_or_refused(call(copy, data.draw(st.sampled_from(READERS))))


@fuzz(40)
@given(data=st.data())
def test_checkpoints_of_a_search(data: st.DataObject, stopped: Lab, lab: Lab) -> None:
    copy = copy_of(stopped)
    for file in data.draw(st.lists(st.sampled_from(files_of(copy, "state/**/*")), min_size=1, max_size=2, unique=True)):
        spoil(data, file)
    outcome = copy.search(*SEARCH, "--batch-size", 1)
    assert outcome.status == 0, outcome
    assert trace_of(copy) == trace_of(lab)


def call(lab: Lab, command: tuple[object, ...]) -> Any:
    page = lab.workspace / "page.html"
    options = [page if each == "PAGE" else each for each in command]
    given = lab.good if command[0] == "search" else []
    return lab.call(options[0], *given, *options[1:])
