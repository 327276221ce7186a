"""A comparison's rows in every form, the paper's figures beside them, and what they are made from."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows.comparison import Outcome, Pair, Published, Row, _accuracies, _speedups, rows_of
from flows.comparison_table import comparison_text, comparison_view, full_table, people_table, standing
from flows.grid import Comparison, make_comparison
from flows.paper_figures import paper_figures
from flows.table_formats import TableFormat
from stages.store_schema import EvaluationRow, SpeedRow
from stages.workspace import Workspace

PAPER = Published("blockpruner", 0.2199, Pair(5.47, 11.51), Pair(0.6896, 0.6017))
GREEDY = Row(
    label="blockpruner",
    model="org/Llama-2-7b_hf",
    strategy="blockpruner",
    strategy_seed=None,
    metric="perplexity",
    block_kinds="both",
    calibration="alpaca",
    num_samples=256,
    seed=42,
    settings={},
    ratio_asked=None,
    num_blocks_asked=17,
    ratio=0.2203,
    num_blocks_removed=17,
    perplexities={"wikitext2": Pair(5.5, 11.4)},
    accuracies={"piqa": Pair(0.8, 0.6), "arc_easy": Pair(0.6, 0.5)},
    average=Pair(0.7, 0.55),
    prefill_speedup=1.5,
    decode_speedup=1.25,
    search_seconds=61.0,
    seconds=130.0,
    status="completed",
    error=None,
    note=None,
    run_id="run-1",
    speed_run_id="run-2",
    published=PAPER,
)
NOTHING: dict[str, Any] = dict.fromkeys(
    ("ratio", "num_blocks_removed", "prefill_speedup", "decode_speedup", "search_seconds", "published", "run_id")
)
FAILED = dataclasses.replace(
    GREEDY,
    label="rm | x",
    strategy="rm",
    metric="relative_magnitude",
    perplexities={},
    accuracies={},
    average=Pair(),
    status="failed",
    error="no space_left & gone",
    speed_run_id=None,
    **NOTHING,
)
ELSEWHERE = dataclasses.replace(
    GREEDY,
    label="SliceGPT",
    strategy="SliceGPT",
    metric=None,
    block_kinds=None,
    num_blocks_asked=None,
    num_blocks_removed=None,
    perplexities={"wikitext2": Pair(5.5, float("inf"))},
    search_seconds=None,
    note="other tokens",
    published=None,
)
ROWS = [GREEDY, FAILED, ELSEWHERE]


@pytest.fixture
def comparison() -> Comparison:
    base = {"model": "m", "ratio": 0.2}
    return make_comparison({"name": "night", "description": "Three rows.", "base": base, "grid": {}})


def test_json_has_everything_and_is_one_line(comparison: Comparison) -> None:
    text = comparison_text(comparison, ROWS, "json", report="r.html")
    assert "\n" not in text
    found = json.loads(text)
    assert (found["comparison"], found["report"]) == ("night", "r.html")
    greedy, failed, elsewhere = found["rows"]
    assert greedy["perplexities"] == {"wikitext2": {"dense": 5.5, "pruned": 11.4}}
    assert greedy["accuracies"]["piqa"] == {"dense": 0.8, "pruned": 0.6}
    assert greedy["retained"] == pytest.approx(0.55 / 0.7)
    assert greedy["published"]["perplexity"] == {"dense": 5.47, "pruned": 11.51}
    assert (failed["status"], failed["error"], failed["retained"]) == ("failed", "no space_left & gone", None)
    assert elsewhere["perplexities"]["wikitext2"]["pruned"] is None  # JSON has no infinity


def test_csv_has_a_column_for_every_number(comparison: Comparison) -> None:
    greedy, failed, elsewhere = csv.DictReader(io.StringIO(comparison_text(comparison, ROWS, "csv")))
    wanted = {
        "strategy": "blockpruner",
        "ratio": "0.2203",
        "num_blocks_removed": "17",
        "perplexity_dense_wikitext2": "5.5",
        "perplexity_pruned_wikitext2": "11.4",
        "accuracy_dense_piqa": "0.8",
        "accuracy_pruned_arc_easy": "0.5",
        "average_pruned": "0.55",
        "prefill_speedup": "1.5",
        "paper_perplexity_pruned": "11.51",
        "paper_average_dense": "0.6896",
        "seconds": "130.0",
        "run_id": "run-1",
    }
    assert {name: greedy[name] for name in wanted} == wanted
    assert (failed["error"], failed["ratio"]) == ("no space_left & gone", "")
    assert elsewhere["perplexity_pruned_wikitext2"] == "inf"


@pytest.mark.parametrize(
    ("form", "separator", "model", "error"),
    [
        ("markdown", " | ", "org/Llama-2-7b_hf", "no space_left \\& gone"),
        ("latex", " & ", "org/Llama-2-7b\\_hf", "no space\\_left \\& gone"),
    ],
)
def test_tables_for_papers_begin_with_the_dense_model(
    form: TableFormat, separator: str, model: str, error: str, comparison: Comparison
) -> None:
    lines = comparison_text(comparison, ROWS, form).splitlines()
    cells = [[cell.strip(" |\\") for cell in line.split(separator)] for line in lines if separator in line]
    head, *body = [line for line in cells if "---" not in line[0]]
    table = [dict(zip(head, line, strict=False)) for line in body]
    assert head[:2] == ["model", "strategy"]
    assert [line["strategy"] for line in table] == ["dense", "blockpruner", "rm", "SliceGPT"]
    dense, greedy, failed, _ = table
    assert dense["model"] == model
    assert [(dense[name], greedy[name]) for name in ("PPL wikitext2", "paper PPL")] == [
        ("5.5", "11.4"),
        ("5.47", "11.51"),
    ]
    assert (greedy["target"], greedy["blocks"], greedy["prefill"]) == ("17 blocks", "17", "1.50x")
    for name, value in (("removed", "22.03"), ("piqa", "60.00"), ("average", "55.00"), ("paper average", "60.17")):
        assert greedy[name].rstrip("%\\") == value
    assert error.replace("\\", "") in " ".join(failed.values()).replace("\\", "")


def test_the_terminal_has_the_cells_labels_and_what_they_share_above(comparison: Comparison) -> None:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(comparison_view(comparison, ROWS))
    text = capture.get()
    head = next(line for line in text.splitlines() if line.startswith("cell"))
    assert "calibration" not in head
    assert "target" not in head
    assert "target 17 blocks" in text
    assert [line.split()[0] for line in text.splitlines() if "%" in line] == ["dense", "blockpruner", "SliceGPT"]
    assert "model org/Llama-2-7b_hf" in text
    assert "calibration alpaca" in text
    assert "rm | x: no space_left & gone" in text
    assert "SliceGPT: other tokens" in text
    assert paper_figures().source[:30] in text


def test_dense_lines_stand_before_their_own_models_cells() -> None:
    other = dataclasses.replace(GREEDY, model="b", label="b")
    table = people_table([GREEDY, other, FAILED])
    model, strategy = (table.columns.index(name) for name in ("model", "strategy"))
    found = [(row[model].rpartition("/")[2], row[strategy]) for row in table.rows]
    assert found == [
        *(("Llama-2-7b_hf", name) for name in ("dense", "blockpruner", "rm")),
        *(("b", name) for name in ("dense", "blockpruner")),
    ]


def test_columns_are_of_what_was_measured() -> None:
    bare = dataclasses.replace(GREEDY, accuracies={}, average=Pair(), prefill_speedup=None, published=None)
    assert not {"average", "retained", "prefill", "paper PPL", "error"} & set(people_table([bare]).columns)
    assert len(full_table([bare]).rows) == 1


def test_draws_are_told_apart() -> None:
    draws = [dataclasses.replace(GREEDY, strategy="random", strategy_seed=seed) for seed in (0, 1)]
    table = people_table([GREEDY, *draws])
    assert [row[table.columns.index("draw")] for row in table.rows] == [None, None, 0, 1]
    assert "draw" not in people_table([GREEDY]).columns


def test_rows_that_differ_in_any_setting_look_different(tmp_path: Path) -> None:
    blocks = [
        {"stock_compatible": [False, True], "ratio": [0.1, 0.2]},
        {"strategy": "laco", "laco_threshold": 0.5},
        {"strategy": "laco", "laco_threshold": 0.9, "laco_interval": 1},
        {"strategy": "random", "strategy_seed": [0, 1]},
        {"calibration": "mine.jsonl", "calibration_column": ["a", "b"]},
        {"export_dtype": "float16", "export_format": "gguf"},
    ]
    comparison = make_comparison({"name": "c", "base": {"model": "m", "ratio": 0.2}, "grid": blocks})
    outcomes = [Outcome(key=cell.key, run_id=None) for cell in comparison.cells]
    rows = rows_of(comparison, outcomes, Workspace(tmp_path), pytest.fail)
    for table in (people_table(rows), full_table([dataclasses.replace(row, label="") for row in rows])):
        assert len(set(table.rows)) == len(table.rows) == len(comparison.cells)
    settings = {row.label: row.settings for row in rows}
    assert settings["laco laco_interval=1 laco_threshold=0.9"] == {"laco_interval": 1, "laco_threshold": 0.9}
    assert settings["random strategy_seed=0"] == {}
    assert {row.metric for row in rows if row.strategy == "laco"} == {"dissimilarity"}  # also of what never ran


def test_what_all_cells_were_given_alike_stands_above_the_terminals_table(tmp_path: Path) -> None:
    comparison = make_comparison({"name": "c", "base": {"model": "m", "ratio": 0.2}, "grid": {"metric": ["kl", "js"]}})
    outcomes = [Outcome(key=cell.key, run_id=None) for cell in comparison.cells]
    console = Console(width=120)
    with console.capture() as capture:
        console.print(comparison_view(comparison, rows_of(comparison, outcomes, Workspace(tmp_path), pytest.fail)))
    lines = capture.get().splitlines()
    assert (
        lines[1] == "model m, strategy blockpruner, block kinds both, calibration alpaca, rows 256, seed 42, target 20%"
    )
    assert [line.split()[0] for line in lines[4:]] == ["kl", "js"]
    assert lines[3].split() == ["cell", "removed", "blocks", "search", "time", "status"]


def test_one_task_needs_no_average() -> None:
    one = dataclasses.replace(GREEDY, accuracies={"piqa": Pair(0.8, 0.6)}, average=Pair(0.8, 0.6))
    assert "average" not in people_table([one]).columns
    assert "average" in people_table([GREEDY]).columns


def test_what_failed_is_counted() -> None:
    assert standing([GREEDY]) is None
    assert standing(ROWS) == "1 of 3 cells failed; give the same command again to try them again"


# --- what rows are made from ------------------------------------------------------------------------------------------


def scored(variant: str, task: str, metric: str, value: float) -> EvaluationRow:
    return EvaluationRow("run", variant, task, metric, value, None, 0, 10)


def test_a_task_counts_with_its_normalised_accuracy_where_it_has_one() -> None:
    rows = [
        scored("dense", "piqa", "acc", 0.7),
        scored("dense", "piqa", "acc_norm", 0.8),
        scored("pruned", "piqa", "acc_norm", 0.6),
        scored("pruned", "piqa", "acc", 0.5),
        scored("dense", "winogrande", "acc", 0.9),
        scored("dense", "story", "word_perplexity", 9.0),
        scored("dense", "average", "acc_norm or acc", 0.85),
    ]
    assert _accuracies(rows) == {"piqa": Pair(0.8, 0.6), "winogrande": Pair(0.9, None)}


def timed(variant: str, batch_size: int, prefill_ms: float, decode: float) -> SpeedRow:
    return SpeedRow("run", variant, batch_size, 128, 32, prefill_ms, decode, 1, 1.0, "here")


def test_speed_is_the_geometric_mean_over_what_was_timed_of_both() -> None:
    rows = [
        *(timed("dense", 1, 30.0, 10.0), timed("pruned", 1, 10.0, 20.0)),
        *(timed("dense", 8, 36.0, 50.0), timed("pruned", 8, 3.0, 400.0)),
        timed("dense", 16, 1.0, 1.0),
    ]
    assert _speedups(rows) == (pytest.approx(6.0), pytest.approx(4.0))
    assert _speedups(rows[-1:]) == (None, None)
