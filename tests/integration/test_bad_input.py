"""What a user can get wrong, over all commands: status 2, one line that helps, no traceback, nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from tests.integration.command_line import Outcome, blockpruner, in_a_process
from tests.tiny_models import save_tiny_model, tiny_rows

TinyFolder = Callable[[str], Path]


@dataclass(frozen=True)
class Lab:
    """A folder with good input to spoil."""

    path: Path
    workspace: Path

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def good(self) -> list[object]:
        """Options of a model and a calibration set."""
        text = ["--calibration", self.path / "cal.txt", "--sequence-length", 16, "--num-samples", "all"]
        return ["--model", self.model, *text]

    def search(self, *changes: object) -> Outcome:
        """A search that would be fine but for the changes."""
        target = [] if {"--num-blocks", "--ratio"} & {str(change) for change in changes} else ["--num-blocks", 1]
        return self.call("search", *self.good, *target, *changes)

    def records(self) -> list[dict[str, Any]]:
        """The run records, newest first."""
        paths = (self.workspace / "runs").glob("*.json")
        records = [json.loads(path.read_text()) for path in paths]
        return sorted(records, key=lambda record: str(record["created_at"]), reverse=True)

    def call(self, *arguments: object) -> Outcome:
        return blockpruner(*arguments, "--workspace", self.workspace)

    def file(self, name: str, content: bytes) -> Path:
        path = self.path / name
        path.write_bytes(content)
        return path

    def model_without(self, name: str) -> Path:
        copy = self.path / f"without-{name}"
        shutil.copytree(self.model, copy)
        (copy / name).unlink()
        return copy


@pytest.fixture
def lab(tmp_path: Path, tiny_folder: TinyFolder) -> Lab:
    shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    (tmp_path / "cal.txt").write_text("\n".join(tiny_rows(40)))
    (tmp_path / "cal.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in tiny_rows(40)))
    return Lab(tmp_path, tmp_path / "ws")


def truncated(lab: Lab) -> Outcome:
    copy = lab.path / "truncated"
    shutil.copytree(lab.model, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return lab.search("--model", copy)


def unknown_architecture(lab: Lab) -> Outcome:
    config = lab.model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "lama"}))
    return lab.search()


def layers_asked(lab: Lab, num_layers: int, command: str = "search") -> Outcome:
    """A model of four layers whose config.json says something else."""
    config = lab.model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": num_layers}))
    target = ["--num-blocks", 1] if command == "search" else []
    return lab.call(command, *lab.good, *target)


def quantized(lab: Lab, command: str) -> Outcome:
    """A model that needs `bitsandbytes`, which is not installed with this project."""
    config = lab.model / "config.json"
    asked = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": asked}))
    target = ["--num-blocks", 1] if command == "search" else []
    return lab.call(command, *lab.good, *target)


def ambiguous_run(lab: Lab) -> Outcome:
    for _ in range(2):
        lab.search()
    return lab.call("show", "20")


def recipe_with(lab: Lab, line: str) -> Outcome:
    return lab.call("run", lab.file("r.yaml", f"model: {lab.model}\nnum_blocks: 1\n{line}\n".encode()))


def recipe_of(lab: Lab, content: bytes) -> Outcome:
    return lab.call("run", lab.file("r.yaml", content))


def spoiled_file(lab: Lab, name: str, content: bytes, *options: object) -> Outcome:
    return lab.search("--calibration", lab.file(name, content), *options)


def export_beyond(lab: Lab) -> Outcome:
    lab.search("--num-blocks", 2)
    return lab.call("export", "latest", "--num-blocks", 8)


def export_onto(lab: Lab) -> Outcome:
    lab.search()
    return lab.call("export", "latest", "--output", lab.model)


def export_to(lab: Lab, output: object) -> Outcome:
    """Refused before any work, so that no artifact is there afterwards."""
    lab.search()
    outcome = lab.call("export", "latest", "--output", output)
    assert not list(lab.workspace.glob("artifacts/export/*"))
    return outcome


def sql(lab: Lab, query: str) -> Outcome:
    lab.search()
    return lab.call("sql", query)


CASES: dict[str, tuple[Callable[[Lab], Outcome], str]] = {
    # models
    "model without config": (
        lambda lab: lab.search("--model", lab.model_without("config.json")),
        "config.json is missing",
    ),
    "model without weights": (lambda lab: lab.search("--model", lab.model_without("model.safetensors")), "safetensors"),
    "model without tokenizer": (lambda lab: lab.search("--model", lab.model_without("tokenizer.json")), "tokenizer"),
    "truncated weights": (truncated, "truncated"),
    **{
        f"{command} of {num_layers} layers": (
            lambda lab, num_layers=num_layers, command=command: layers_asked(lab, num_layers, command),
            said,
        )
        for command in ("search", "baseline")
        for num_layers, said in (
            (6, "lacks the weights of layers 4 to 5 that its config.json asks for"),
            (2_000_000_000, "lacks the weights of layers 4 to 1999999999"),
            (0, "says that it has 0 layers"),
            (-1, "says that it has -1 layers"),
        )
    },
    "quantized model, searched": (lambda lab: quantized(lab, "search"), "needs a library that is not installed"),
    "quantized model, measured": (lambda lab: quantized(lab, "baseline"), "needs a library that is not installed"),
    "unknown architecture": (unknown_architecture, "qwen3, qwen3_moe; did you mean 'llama'"),
    "model that is a file": (lambda lab: lab.search("--model", lab.path / "cal.txt"), "is a file"),
    "model folder that is not there": (lambda lab: lab.search("--model", "./nowhere"), "no model folder"),
    "hub id while offline": (lambda lab: lab.search("--model", "org/model"), "HF_HUB_OFFLINE"),
    "no model": (lambda lab: lab.call("search", "--num-blocks", 1), "--model"),
    # calibration
    "calibration file missing": (lambda lab: lab.search("--calibration", "gone.txt"), "no text file gone.txt"),
    "calibration name misspelt": (lambda lab: lab.search("--calibration", "alpacca"), "did you mean 'alpaca'"),
    "calibration of the hub while offline": (lambda lab: lab.search("--calibration", "wikitext2"), "local file"),
    "hub dataset with an unknown field": (lambda lab: lab.search("--calibration", "hub://a/b?splt=x"), "'split'"),
    "hub dataset without a name": (lambda lab: lab.search("--calibration", "hub:///"), "names no dataset"),
    "calibration file empty": (lambda lab: spoiled_file(lab, "e.txt", b""), "is empty"),
    "calibration of blank lines": (lambda lab: spoiled_file(lab, "b.txt", b"\n \n"), "b.txt"),
    "calibration not UTF-8": (lambda lab: spoiled_file(lab, "l.txt", b"caf\xe9\n" * 50), "UTF-8"),
    "calibration lacks the column": (
        lambda lab: lab.search("--calibration", lab.path / "cal.jsonl", "--calibration-column", "txt"),
        "'text'",
    ),
    "calibration too short": (lambda lab: spoiled_file(lab, "s.txt", b"a\n"), "too short"),
    "calibration with too few rows": (lambda lab: lab.search("--num-samples", 1000), "or for all"),
    "calibration of broken lines": (lambda lab: spoiled_file(lab, "j.jsonl", b'{"text": \n'), "j.jsonl"),
    "calibration of numbers": (lambda lab: spoiled_file(lab, "n.jsonl", b'{"text": 3}\n'), "n.jsonl"),
    "calibration of an unknown kind": (lambda lab: spoiled_file(lab, "c.docx", b"x"), ".jsonl"),
    "calibration that is a folder": (lambda lab: lab.search("--calibration", lab.model), "is not a file"),
    "calibration column of a .txt": (lambda lab: lab.search("--calibration-column", "a"), "no columns"),
    # how far
    "K of 0": (lambda lab: lab.search("--num-blocks", 0), "num_blocks is 0"),
    "K negative": (lambda lab: lab.search("--num-blocks", -1), "num_blocks is -1"),
    "K of all blocks": (lambda lab: lab.search("--num-blocks", 8), "but of the 8 blocks one must stay; give at most 7"),
    "K of all blocks of a kind": (
        lambda lab: lab.search("--num-blocks", 4, "--block-kinds", "mha"),
        "but of the 4 mha blocks one must stay; give at most 3",
    ),
    "K not a number": (lambda lab: lab.search("--num-blocks", "x"), "--num-blocks"),
    "ratio of 0": (lambda lab: lab.search("--ratio", 0), "ratio is 0"),
    "ratio of 1": (lambda lab: lab.search("--ratio", 1), "ratio is 1"),
    "ratio not a number": (lambda lab: lab.search("--ratio", "nan"), "ratio is nan"),
    "ratio out of reach": (lambda lab: lab.search("--ratio", 0.99), "smaller ratio"),
    "both K and ratio": (lambda lab: lab.search("--num-blocks", 1, "--ratio", 0.1), "both num_blocks and ratio"),
    "neither K nor ratio": (lambda lab: lab.call("run", "--model", lab.model), "--num-blocks K or --ratio R"),
    "export more than can go": (export_beyond, "at most 7"),
    "export onto something": (export_onto, "is there already"),
    **{
        f"export to {output}": (lambda lab, output=output: export_to(lab, output), said)
        for output, said in (
            (".", ". is there already"),
            ("", "'' is given where a folder is meant"),
            ("/dev/shm", "; give --output a new folder"),
            (Path(__file__) / "below" / "a-file", "test_bad_input.py is a file"),
        )
    },
    # paths
    **{
        f"{kind} in {place[-1]}": (
            lambda lab, place=place, path=path: blockpruner(
                *place[:1], "--workspace", lab.workspace, *lab.good, *place[1:], path
            ),
            said,
        )
        for place in (
            ("baseline", "--model"),
            ("baseline", "--calibration"),
            ("baseline", "--eval-text"),
            ("evaluate", "--tasks", "t", "--task-dir"),
            ("export", "--num-blocks", 1, "--output"),
            ("export", "--num-blocks", 1, "--workspace"),
            ("run",),
        )
        for kind, path, said in (
            ("home of nobody", "~nobody-here/x", "the home folder of a user who is not known here"),
            ("name too long", "x" * 300, "longer than the file system allows (300 characters)"),
            ("path too long", "x/" * 3000, "longer than the file system allows (6000 characters)"),
        )
    },
    "null character in a recipe": (lambda lab: recipe_of(lab, b'model: "a\\0b"\nnum_blocks: 1\n'), "null character"),
    **{
        f"export among the results in {place}": (
            lambda lab, place=place: export_to(lab, lab.workspace / place),
            "is a place for results in the workspace",
        )
        for place in ("artifacts/mine", "runs/mine", "state")
    },
    "workspace without a name": (lambda lab: blockpruner("runs", "--workspace", ""), "'' is given"),
    # settings
    "unknown block kinds": (lambda lab: lab.search("--block-kinds", "mlpp"), "did you mean 'mlp'"),
    "unknown device": (lambda lab: lab.search("--device", "cudda"), "did you mean 'cuda'"),
    "device that is not there": (lambda lab: lab.search("--device", "cuda:7"), "not on this machine"),
    "unknown dtype": (lambda lab: lab.search("--dtype", "bfloat61"), "did you mean 'bfloat16'"),
    "sequence length of 0": (lambda lab: lab.search("--sequence-length", 0), "sequence_length is 0"),
    **{
        f"{option[0]} out of all bounds": (
            lambda lab, option=option: lab.call("evaluate", *lab.good, "--num-blocks", 1, *option),
            f"{option[0][2:].replace('-', '_')} is ",
        )
        for option in (
            ("--sequence-length", 3_000_000_000),
            ("--num-samples", 99999999999999999999999),
            ("--num-blocks", 3_000_000_000),
            ("--limit", 10**19),
            ("--num-fewshot", 10**10),
            ("--batch-size", 2**63),
        )
    },
    "rows of 0": (lambda lab: lab.search("--num-samples", 0), "num_samples is 0"),
    "unknown option": (lambda lab: lab.search("--modle", "x"), "No such option"),
    "unknown command": (lambda lab: lab.call("serach"), "serach"),
    "option without a value": (lambda lab: blockpruner("search", "--model"), "--model"),
    "nothing to evaluate": (lambda lab: lab.call("evaluate", "--model", lab.model), "--tasks a,b or --eval-text"),
    "unknown task": (lambda lab: lab.call("evaluate", "--model", lab.model, "--tasks", "hellaswagg"), "'hellaswag'"),
    "task folder missing": (
        lambda lab: lab.call("evaluate", "--model", lab.model, "--tasks", "t", "--task-dir", "gone"),
        "no task folder",
    ),
    "task data missing": (
        lambda lab: lab.call("evaluate", "--model", lab.model, "--tasks", "piqa", "--task-data", lab.path),
        "piqa.jsonl with the questions of piqa",
    ),
    "task data without tasks": (
        lambda lab: lab.call("evaluate", *lab.good, "--num-blocks", 1, "--task-data", lab.path),
        "task_data is given and no tasks",
    ),
    "batch size that is no number": (lambda lab: lab.search("--batch-size", "autoo"), ", or auto"),
    "evaluation text missing": (
        lambda lab: lab.call("evaluate", "--model", lab.model, "--eval-text", "gone.txt"),
        "no text file",
    ),
    # recipes
    "unknown recipe field": (lambda lab: recipe_with(lab, "num_sample: 3"), "did you mean 'num_samples'"),
    "recipe with a bad value": (lambda lab: recipe_with(lab, "dtype: half"), "unknown dtype 'half'"),
    "recipe with a key twice": (lambda lab: recipe_with(lab, "model: x"), "'model' is given in line 1 and in line 3"),
    "recipe with a truth value": (lambda lab: recipe_with(lab, "limit: true"), "limit is True: it should be a number"),
    "recipe with memory and no unit": (lambda lab: recipe_with(lab, "memory_budget: 8"), "with a unit, as 8GiB"),
    "memory without a unit": (lambda lab: lab.search("--memory-budget", "8"), "with a unit, as 8GiB"),
    "memory beyond any device": (lambda lab: lab.search("--memory-budget", "9" * 400 + "GB"), "than any device has"),
    "recipe missing": (lambda lab: lab.call("run", "gone.yaml"), "no recipe file"),
    "recipe that is not YAML": (lambda lab: recipe_of(lab, b"model: ["), "cannot be read"),
    "recipe that is a list": (lambda lab: recipe_of(lab, b"- a"), "holds no settings"),
    "recipe not UTF-8": (lambda lab: recipe_of(lab, b"model: \xff"), "cannot be read"),
    "run with a bad model": (lambda lab: lab.call("run", "--model", "./gone", "--num-blocks", 1), "no model folder"),
    # workspace, runs, database
    "workspace below a file": (
        lambda lab: blockpruner("run", "demo", "--workspace", lab.path / "cal.txt" / "ws"),
        "cannot be written",
    ),
    **{
        f"{command[0]} of a workspace {what}": (
            lambda lab, command=command, place=place: blockpruner(*command, "--workspace", lab.path / place),
            said,
        )
        for command in (("runs",), ("show", "latest"), ("sql", "SELECT 1"), ("export", "latest"), ("evaluate", "x"))
        for what, place, said in (
            ("that is a file", "cal.txt", "cal.txt is a file; give the folder"),
            ("that is not there", "nowhere", "nowhere is not there; give the folder"),
        )
    },
    "show without runs": (
        lambda lab: blockpruner("show", "latest", "--workspace", lab.path),
        "no runs in the workspace",
    ),
    "SQL without results": (lambda lab: blockpruner("sql", "SELECT 1", "--workspace", lab.path), "no results"),
    "show nothing": (lambda lab: (lab.search(), lab.call("show", ""))[1], "no run is named; give an id"),
    "show an unknown run": (lambda lab: (lab.search(), lab.call("show", "xyz"))[1], "no run 'xyz'"),
    "show an ambiguous run": (ambiguous_run, "ambiguous"),
    "export an unknown run": (lambda lab: lab.call("export", "xyz"), "no runs"),
    "SQL error": (lambda lab: sql(lab, "SELEC * FROM runs"), "syntax error"),
    "SQL of an unknown table": (lambda lab: sql(lab, "SELECT * FROM rums"), "runs"),
    "SQL that writes": (lambda lab: sql(lab, "DROP TABLE runs"), "reads"),
    "SQL that reads a file": (lambda lab: sql(lab, "SELECT * FROM read_text('/etc/hostname')"), "disabled"),
    "SQL that is no text": (lambda lab: sql(lab, "SELECT '\udcff'"), "character 9 is no Unicode"),
    "both JSON and CSV": (lambda lab: lab.call("runs", "--json", "--csv"), "both --json and --csv"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_status_2(name: str, lab: Lab) -> None:
    case, said = CASES[name]
    outcome = case(lab)
    last = outcome.stderr.splitlines()[-1] if outcome.stderr else ""
    assert outcome.status == 2, outcome
    assert outcome.stdout == ""
    assert last.startswith("Error: "), outcome.stderr
    assert said in last
    assert "Traceback" not in outcome.stderr
    assert [line for line in outcome.stderr.splitlines() if line.startswith("Error")] == [last]


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
        assert len(outcome.stderr.splitlines()) == 1
        assert outcome.stderr.startswith("Error: ")


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
    calibrated, error = outcome.stderr.splitlines()
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
