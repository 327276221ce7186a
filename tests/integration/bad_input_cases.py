"""What a user can get wrong, by name: the call, and words of the line that says it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.integration.bad_input_lab import (
    Lab,
    ambiguous_run,
    export_beyond,
    export_onto,
    export_to,
    layers_asked,
    quantized,
    recipe_of,
    recipe_with,
    spoiled_file,
    sql,
    truncated,
    unknown_architecture,
)
from tests.integration.command_line import Outcome, blockpruner

Case = tuple[Callable[[Lab], Outcome], str]

CASES: dict[str, Case] = {
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
            (2_000_000_000, "asks for 2000000000 layers (num_hidden_layers), and the weight files hold 39 tensors"),
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
            (Path(__file__) / "below" / "a-file", "bad_input_cases.py is a file"),
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
