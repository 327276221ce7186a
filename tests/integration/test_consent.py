"""What lets code of others run is never taken over from a run's record: a command that goes on from one gives it again.

The records here are somebody else's: no code of the model's or of the tasks' has run in this process when they are
there, and what has run leaves a mark.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from flows.runner import Runner
from tests.integration.bad_input_lab import Lab, refused
from tests.integration.test_foreign_files import code, small

CLASS = "from transformers import LlamaForCausalLM\n\n\nclass Mine(LlamaForCausalLM):\n    pass\n"
FUNCTION = "\n\ndef text(doc):\n    return doc['question']\n"
TASK = """
task: mine
dataset_path: json
dataset_kwargs:
  data_files:
    test: rows.jsonl
test_split: test
output_type: loglikelihood
doc_to_text: !function evil.text
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
"""


@pytest.fixture
def theirs(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Lab:
    """A run of a search, with a model and tasks that bring code."""
    lab = small(tmp_path, tiny_folder("llama"))
    config = lab.model / "config.json"
    settings = json.loads(config.read_text()) | {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}
    config.write_text(json.dumps(settings))
    (lab.model / "modeling.py").write_text(code(tmp_path / "model-code") + CLASS)
    tasks = tmp_path / "their tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text('{"question": "a b", "answer": " c"}\n{"question": "b c", "answer": " a"}\n')
    (tasks / "evil.py").write_text(code(tmp_path / "task-code") + FUNCTION)
    (tasks / "mine.yaml").write_text(TASK)
    assert lab.search().status == 0
    return lab


def recorded(lab: Lab, settings: dict[str, Any], **fields: object) -> str:
    """Write other settings into the newest record; its id."""
    (record, *_) = lab.records()
    changed = {**record, **fields, "config": {**record["config"], **settings}}
    path = lab.workspace / "runs" / f"{record['run_id']}.json"
    path.write_text(json.dumps(changed))
    return str(record["run_id"])


def forget(lab: Lab, stage: str) -> None:
    shutil.rmtree(lab.workspace / "artifacts" / stage)
    shutil.rmtree(lab.workspace / "state", ignore_errors=True)


def marks(lab: Lab) -> set[str]:
    return {path.name for path in lab.path.glob("*-code")}


def shown(option: str, value: object) -> str:
    return f"{option} '{value}'"


def test_a_models_code_is_not_run_because_a_record_trusts_it(theirs: Lab) -> None:
    text = theirs.path / "new.txt"
    run_id = recorded(theirs, {"trust_remote_code": True})
    commands: list[tuple[object, ...]] = [
        ("speed", "latest"),
        ("evaluate", "latest", "--eval-text", text),
        ("export", "latest", "--num-blocks", 3),
    ]
    for command in commands:
        line = refused(theirs.call(*command))
        assert run_id in line
        assert line.endswith("give them again: --trust-remote-code")
    for changes in ({"goal": "evaluate"}, {"goal": "evaluate", "flow_run_id": "theirs"}):
        recorded(theirs, {"eval_text": [str(text)]}, status="cancelled", **changes)
        assert run_id in refused(theirs.call("resume", "latest"))
    assert marks(theirs) == set()
    assert len(theirs.records()) == 1  # what is refused comes between nobody and the run
    assert theirs.call("resume", "latest", "--trust-remote-code").status == 0
    assert marks(theirs) == {"model-code"}


def test_the_code_of_tasks_is_not_run_because_a_record_names_their_folder(theirs: Lab) -> None:
    folder = theirs.path / "their tasks"
    run_id = recorded(theirs, {"tasks": ["mine"], "task_dir": str(folder)}, status="cancelled", goal="evaluate")
    for command in (("resume", "latest"), ("evaluate", "latest")):
        line = refused(theirs.call(*command))
        assert run_id in line
        assert line.endswith(f"give them again: {shown('--task-dir', folder)}")
    assert marks(theirs) == set()
    assert theirs.call("resume", "latest", "--task-dir", folder).status == 0
    assert marks(theirs) == {"task-code"}


@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install -c constraints.txt -e '.[ray]'")
def test_nobody_joins_a_cluster_because_a_record_names_it(theirs: Lab) -> None:
    forget(theirs, "search")
    with socket.create_server(("127.0.0.1", 0)) as cluster:
        cluster.settimeout(0.2)
        address = f"127.0.0.1:{cluster.getsockname()[1]}"
        recorded(theirs, {"executor": "ray", "ray_address": address}, status="cancelled")
        for command in (("resume", "latest"), ("export", "latest"), ("speed", "latest")):
            assert refused(theirs.call(*command)).endswith(f"give them again: --ray-address {address}")
        with pytest.raises(TimeoutError):
            cluster.accept()
    assert theirs.call("export", "latest", "--executor", "local").status == 0  # where it is not needed


def test_what_is_not_needed_need_not_be_given_again(theirs: Lab) -> None:
    """All that is computed here is an export, which runs no code of a model's."""
    folder = theirs.path / "their tasks"
    consents = {"trust_remote_code": True, "tasks": ["mine"], "task_dir": str(folder)}
    recorded(theirs, consents, status="cancelled", goal="search")
    found = theirs.call("resume", "latest", "--json").json
    assert [stage["cached"] for stage in found["stages"]] == [True, True]
    recorded(theirs, consents)
    found = theirs.call("export", "latest", "--json").json
    assert [stage["cached"] for stage in found["stages"]] == [True, True, False]
    assert marks(theirs) == set()


def test_a_run_whose_stages_are_all_there_needs_nothing(theirs: Lab) -> None:
    folder = theirs.path / "their tasks"
    asked = ("--num-blocks", 1, "--tasks", "mine", "--task-dir", folder, "--trust-remote-code")
    done = theirs.call("evaluate", *theirs.good, *asked, "--json").json
    run_id = recorded(theirs, {}, status="cancelled")
    found = theirs.call("resume", run_id, "--json").json
    assert all(stage["cached"] for stage in found["stages"])
    assert found["evaluations"] == done["evaluations"]
    forget(theirs, "evaluate")
    again = refused(theirs.call("resume", run_id))
    assert again.endswith(f"give them again: --trust-remote-code {shown('--task-dir', folder)}")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), None])
def test_the_line_that_a_run_ends_with_names_what_is_to_be_given_again(
    error: BaseException | None, theirs: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = theirs.path / "their tasks"
    asked = ("--tasks", "mine", "--task-dir", folder, "--trust-remote-code")
    if error is not None:  # interrupted

        def stage(*_: object) -> None:
            raise error

        monkeypatch.setattr(Runner, "_stage", stage)
        said = theirs.call("evaluate", *theirs.good, *asked).stderr
    else:  # killed
        theirs.call("evaluate", "--model", theirs.model, *asked)
        recorded(theirs, {}, status="running", process_started="long ago")
        said = theirs.call("runs").stderr + str(theirs.records()[0]["error"])
    (run, *_) = theirs.records()
    command = f"`blockpruner resume {run['run_id']} --trust-remote-code {shown('--task-dir', folder)}"
    assert command in said
    assert f"{command}`" in run["error"]
