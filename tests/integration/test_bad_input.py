"""What a user can get wrong, over all commands: status 2, one line that helps, no traceback, nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from flows.reporter import LOADING
from tests.integration.bad_input_cases import CASES
from tests.integration.bad_input_lab import Lab, refused, spoiled_file
from tests.integration.command_line import in_a_process
from tests.tiny_models import save_tiny_model, tiny_rows

TinyFolder = Callable[[str], Path]


@pytest.fixture
def lab(tmp_path: Path, tiny_folder: TinyFolder) -> Lab:
    shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    (tmp_path / "cal.txt").write_text("\n".join(tiny_rows(40)))
    (tmp_path / "cal.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in tiny_rows(40)))
    return Lab(tmp_path, tmp_path / "ws")


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_status_2(name: str, lab: Lab) -> None:
    case, said = CASES[name]
    assert said in refused(case(lab))


@pytest.mark.parametrize("command", ["search", "baseline", "evaluate"])
def test_sequences_longer_than_a_table_of_positions_are_refused_before_anything(
    command: str, lab: Lab, tiny_folder: TinyFolder
) -> None:
    given = [*lab.good, "--model", tiny_folder("opt"), "--sequence-length", 257]
    given += {"search": ["--num-blocks", 1], "baseline": [], "evaluate": ["--eval-text", lab.path / "cal.txt"]}[command]
    outcome = lab.call(command, *given)
    assert outcome.status == 2
    (line,) = outcome.stderr.splitlines()
    assert line.endswith("this model knows 256 positions; give --sequence-length 256 or less")
    assert lab.records()[0]["stages"] == []


@pytest.mark.parametrize("command", ["search", "baseline"])
def test_a_tokenizer_with_more_tokens_than_the_model_is_one_line(command: str, lab: Lab) -> None:
    small = save_tiny_model(lab.path / "small", vocab_size=100)
    target = ["--num-blocks", 1] if command == "search" else []
    outcome = lab.call(command, *lab.good, *target, "--model", small)
    assert outcome.status == 2
    assert "the text 'calibration' holds token id" in outcome.stderr.splitlines()[-1]
    assert "the model knows 100 tokens" in outcome.stderr.splitlines()[-1]
    assert not list(lab.workspace.glob("state/search/*/*"))


def test_a_number_out_of_all_bounds_leaves_nothing_behind(lab: Lab) -> None:
    assert lab.search("--sequence-length", 3_000_000_000).status == 2
    assert not lab.workspace.exists()


def test_a_run_that_was_refused_is_a_row_and_spoils_nothing(lab: Lab) -> None:
    lab.search()
    spoiled_file(lab, "s.txt", b"a\n")
    lab.call("run", "--model", lab.path / "gone", "--num-blocks", 1)
    rows = lab.call("sql", "SELECT status, error FROM runs ORDER BY created_at", "--json").json
    assert [row["status"] for row in rows] == ["completed", "failed", "failed"]
    assert "too short" in rows[1]["error"]
    assert "no model folder" in rows[2]["error"]
    assert all(stage["cached"] for stage in lab.search("--json").json["stages"])


def test_a_changed_byte_in_an_artifact_is_noticed_said_and_computed_again(lab: Lab) -> None:
    first = lab.search("--json").json
    (trace,) = lab.workspace.glob("artifacts/search/*/trace.jsonl")
    content = bytearray(trace.read_bytes())
    content[20] ^= 1
    trace.write_bytes(content)
    again = lab.search("--json")
    assert "trace.jsonl" in again.stderr
    assert "computed again" in again.stderr
    assert [step["perplexity"] for step in again.json["pruning_order"]] == [
        step["perplexity"] for step in first["pruning_order"]
    ]
    assert [stage["cached"] for stage in again.json["stages"]] == [True, False]


def test_real_processes_too(lab: Lab) -> None:
    for arguments in (
        ("sql", "SELECT 1"),
        ("search", "--model", lab.path / "gone", "--num-blocks", 1, "--json"),
        ("show", "nothing"),
    ):
        outcome = in_a_process(*arguments, "--workspace", lab.workspace)
        assert outcome.status == 2
        assert outcome.stdout == ""
        *before, error = outcome.stderr.splitlines()
        assert before == ([f"{LOADING} ..."] if arguments[0] == "search" else [])
        assert error.startswith("Error: ")


@pytest.mark.parametrize(
    ("content", "said", "ran"),
    [
        (b"caf\xe9\n" * 50, "is not UTF-8", []),
        (b"\n", "is empty", []),
        (b"a\n", "too short", ["calibration", "text:e.txt"]),
    ],
)
def test_a_bad_evaluation_text_is_found_before_the_model_is_loaded(
    content: bytes, said: str, ran: list[str], lab: Lab
) -> None:
    spoiled = lab.file("e.txt", content)
    for command in ("evaluate", "baseline"):
        target = ["--num-blocks", 1] if command == "evaluate" else []
        outcome = lab.call(command, *lab.good, *target, "--eval-text", spoiled)
        assert outcome.status == 2
        assert said in outcome.stderr.splitlines()[-1]
        assert [stage["role"] for stage in lab.records()[0]["stages"]] == ran


def test_a_bad_file_is_refused_before_prefect_starts(lab: Lab) -> None:
    for option in ("--eval-text", "--calibration"):
        outcome = lab.call("run", *lab.good, "--num-blocks", 1, option, lab.file("e.txt", b"caf\xe9\n" * 50))
        assert outcome.status == 2
        assert [line[:7] for line in outcome.stderr.splitlines()] == ["Error: "]


def test_tasks_whose_data_is_not_there_are_found_before_the_search(lab: Lab) -> None:
    """As a registered task's is while offline: the name is known, and the data is not on this machine."""
    tasks = lab.path / "tasks"
    tasks.mkdir()
    (tasks / "far.yaml").write_text(
        "task: far\ndataset_path: somebody/far\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: prompt\ndoc_to_choice: choices\ndoc_to_target: answer\n"
    )
    outcome = lab.call("evaluate", *lab.good, "--num-blocks", 1, "--tasks", "far", "--task-dir", tasks)
    assert outcome.status == 2
    assert "the data of the tasks far is not on this machine" in outcome.stderr.splitlines()[-1]
    assert [stage["role"] for stage in lab.records()[0]["stages"]] == ["calibration", "evaluate:dense"]


def test_weights_that_lack_a_tensor_are_one_line_for_every_stage(lab: Lab) -> None:
    """`baseline` prunes nothing and takes models of any family, so that only loading them tells."""
    weights = lab.model / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})
    outcome = in_a_process("baseline", *lab.good, "--workspace", lab.workspace)
    assert outcome.status == 2
    _, calibrated, error = outcome.stderr.splitlines()
    assert calibrated.startswith("calibrate ")
    assert error.startswith("Error: ")
    assert "lacks 1 tensors" in error
    (run,) = lab.records()
    assert lab.search().status == 2
    refused, _ = lab.records()
    assert [stage["role"] for stage in run["stages"]] == ["calibration", "baseline"]
    assert refused["stages"] == []  # a search is refused before anything


def test_a_defect_of_ours_keeps_its_traceback(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("stages.search.GreedySearch", broken)
    with pytest.raises(ZeroDivisionError):
        lab.search()
    row = lab.call("sql", "SELECT status, error FROM runs", "--json").json
    assert row == [{"status": "failed", "error": "ZeroDivisionError: ours"}]


def test_a_family_that_cannot_be_repacked_is_exported_with_zeros(lab: Lab, tiny_folder: TinyFolder) -> None:
    given = [*lab.good, "--model", tiny_folder("falcon-one-norm"), "--num-blocks", 3]
    assert lab.call("search", *given).status == 0
    assert lab.call("export", "latest", "--json").json["export"]["format"] == "zeroed"
    refused = lab.call("export", "latest", "--export-format", "stock")
    assert refused.status == 2
    assert "side by side" in refused.stderr.splitlines()[-1]
    assert lab.call("evaluate", *given, "--eval-text", lab.path / "cal.txt").status == 0
