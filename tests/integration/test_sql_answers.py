"""The README's ten questions on a store that real runs have filled, and the database made anew from what they left.

The answers are worked out here from what each run said when it ended (`--json`) and from the traces of the searches,
without SQL.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import duckdb
import pytest

from tests.integration.command_line import ROOT, blockpruner
from tests.tiny_models import tiny_rows

QUESTIONS = dict(
    re.findall(r"^\d+\. (.+?\?).*?\n\n +```sql\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
)
TASK = (
    "task: tiny\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: tiny.jsonl\ntest_split: test\n"
    "output_type: multiple_choice\ndoc_to_text: prompt\ndoc_to_choice: choices\ndoc_to_target: answer\n"
    "metric_list:\n  - metric: acc\n"
)


@dataclass(frozen=True)
class Store:
    """A workspace, and what its runs said, by name."""

    workspace: Path
    model: str
    runs: dict[str, dict[str, Any]]

    def ask(self, beginning: str) -> list[dict[str, Any]]:
        """The answer to the README's question that begins so."""
        (query,) = (query for question, query in QUESTIONS.items() if question.startswith(beginning))
        rows: list[dict[str, Any]] = blockpruner("sql", query, "--workspace", self.workspace, "--json").json
        return rows

    @property
    def ids(self) -> dict[str, str]:
        return {name: run["run_id"] for name, run in self.runs.items()}

    @property
    def searches(self) -> dict[str, list[dict[str, Any]]]:
        """The pruning order of each run that has one."""
        return {name: run["pruning_order"] for name, run in self.runs.items() if run["pruning_order"]}


@pytest.fixture(scope="module")
def store(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("answers")
    (folder / "cal.txt").write_text("\n".join(tiny_rows(60)))
    (folder / "held.txt").write_text("\n".join(tiny_rows(30, seed=1)))
    (folder / "tasks").mkdir()
    rows = [{"prompt": "the river", "choices": ["stone", "lantern"], "answer": i % 3 % 2} for i in range(6)]
    (folder / "tasks" / "tiny.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks" / "tiny.yaml").write_text(TASK)
    model = str(tiny_folder("llama"))
    given = ["--workspace", folder / "ws", "--json"]
    start = ["--model", model, "--calibration", folder / "cal.txt", "--sequence-length", 16, *given]
    text, tasks = ["--eval-text", folder / "held.txt"], ["--tasks", "tiny", "--task-dir", folder / "tasks"]
    drawn, again = ["--num-samples", 40], ["--num-samples", 40, "--seed", 7]
    calls: dict[str, list[Any]] = {
        "greedy": ["evaluate", *start, *drawn, "--num-blocks", 4, *text, *tasks],
        "shorter": ["search", *start, *drawn, "--num-blocks", 2],
        "cached": ["search", *start, *drawn, "--num-blocks", 4],
        "mlp": ["evaluate", *start, *drawn, "--num-blocks", 2, "--block-kinds", "mlp", *text],
        "kl": ["search", *start, *drawn, "--num-blocks", 3, "--metric", "kl"],
        "seed": ["search", *start, *again, "--num-blocks", 3],
        "timed": ["speed", "greedy", *given, *"--batch-sizes 1,2 --prompt-tokens 6 --new-tokens 2 --repeats 1".split()],
    }  # fmt: skip
    runs = {name: blockpruner(*call, "--name", name).json for name, call in calls.items()}
    yield Store(folder / "ws", model, runs)
    shutil.rmtree(folder)


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-9)


def blocks(order: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(step["block_kind"], step["layer_index"]) for step in order]


def calibrated(run: dict[str, Any], variant: str, text: str) -> float:
    (value,) = (r["perplexity"] for r in run["perplexities"] if (r["variant"], r["text"]) == (variant, text))
    return float(value)


METHODS = {
    "greedy": ("perplexity", "both"),
    "mlp": ("perplexity", "mlp"),
    "kl": ("kl", "both"),
    "seed": ("perplexity", "both"),
}


# --- the ten questions ------------------------------------------------------------------------------------------------


def test_there_are_ten_questions() -> None:
    assert len(QUESTIONS) == 10


def test_every_question_has_an_answer(store: Store) -> None:
    assert all(store.ask(question) for question in QUESTIONS)


def test_the_best_for_their_size(store: Store) -> None:
    listed = [
        (name, text, store.runs[name]["pruning_order"][-1]["ratio"], calibrated(store.runs[name], "pruned", text))
        for name, text in [("greedy", "held.txt"), ("mlp", "held.txt")]
        + [(name, "calibration") for name in ("greedy", "shorter", "mlp", "kl")]
    ]
    expected = {
        (name, text)
        for name, text, ratio, perplexity in listed
        if not any(t == text and r >= ratio and p < perplexity for _, t, r, p in listed)
    }
    expected.add(("seed", "calibration"))  # on a set that no other run was calibrated on
    rows = store.ask("Which pruned models")
    # `cached` and `timed` have the same pruned model as `greedy`, which measured it with tasks as well.
    assert {(row["name"], row["text"]) for row in rows} == expected
    for row in rows:
        if row["name"] in METHODS:
            run = store.runs[row["name"]]
            assert row["perplexity"] == close(calibrated(run, "pruned", row["text"]))
            assert row["times_dense"] == close(row["perplexity"] / calibrated(run, "dense", row["text"]))
            assert row["run_id"] == run["run_id"]
    (accuracy,) = (
        e["value"] for e in store.runs["greedy"]["evaluations"] if (e["variant"], e["metric"]) == ("pruned", "acc")
    )
    assert {row["pruned_accuracy"] for row in rows if row["name"] == "greedy"} == {accuracy}


def test_the_curve(store: Store) -> None:
    rows = store.ask("How does perplexity grow")
    for name, order in store.searches.items():
        mine = [row for row in rows if row["run_id"] == store.ids[name]]
        dense = store.runs[name]["dense_perplexity"]
        assert [row["num_blocks_removed"] for row in mine] == list(range(len(order) + 1))
        assert [row["ratio"] for row in mine] == [0.0, *(step["ratio"] for step in order)]
        # Of the last one the export was measured, which adds up in another order than the search.
        expected = [dense, *(step["perplexity"] for step in order)]
        assert [row["perplexity"] for row in mine] == pytest.approx(expected, rel=1e-5)
        assert [row["times_dense"] for row in mine] == pytest.approx([p / dense for p in expected], rel=1e-5)


def test_how_much_can_go(store: Store) -> None:
    expected: dict[tuple[str, str], float] = defaultdict(float)
    for name, method in METHODS.items():
        dense = store.runs[name]["dense_perplexity"]
        for step in store.searches[name]:
            if step["perplexity"] < 1.5 * dense:
                expected[method] = max(expected[method], step["ratio"])
    rows = {(row["metric"], row["block_kinds"]): row["ratio"] for row in store.ask("How much of a model")}
    assert rows == expected
    assert max(rows.values()) > 0


def test_redundant_blocks(store: Store) -> None:
    orders = {name: blocks(store.searches[name]) for name in METHODS}  # `shorter` and `cached` are part of `greedy`
    every = [(kind, layer) for kind in ("mha", "mlp") for layer in range(4)]
    expected = {}
    for block in every:
        able = [order for name, order in orders.items() if name != "mlp" or block[0] == "mlp"]
        places = [1 - order.index(block) / len(order) if block in order else 0.0 for order in able]
        if any(places):
            first = min(order.index(block) + 1 for order in able if block in order)
            expected[block] = (close(fmean(places)), sum(place > 0 for place in places), len(able), first)
    rows = store.ask("Which blocks can")
    found = {
        (row["block_kind"], row["layer_index"]): (
            row["redundancy"], row["num_removed"], row["num_searches"], row["first_step"]
        )
        for row in rows
    }  # fmt: skip
    assert found == expected
    assert [row["redundancy"] for row in rows] == sorted((row["redundancy"] for row in rows), reverse=True)


def test_what_goes_first(store: Store) -> None:
    expected = {
        (store.ids[name], kind): (len(steps), fmean(steps))
        for name, order in store.searches.items()
        for kind in ("mha", "mlp")
        if (steps := [step["step"] for step in order if step["block_kind"] == kind])
    }
    rows = store.ask("What goes first")
    assert {(r["run_id"], r["block_kind"]): (r["num_removed"], r["mean_step"]) for r in rows} == expected


def test_the_same_blocks(store: Store) -> None:
    sets = {store.ids[name]: set(blocks(order)) for name, order in store.searches.items()}
    expected = {
        pair: len(sets[pair[0]] & sets[pair[1]]) / len(sets[pair[0]] | sets[pair[1]])
        for pair in combinations(sorted(sets), 2)
    }
    assert {(r["one"], r["other"]): r["jaccard"] for r in store.ask("Do two runs")} == expected
    assert 1.0 in expected.values()


def test_methods(store: Store) -> None:
    rows = store.ask("Which method")
    held = [row for row in rows if row["text"] == "held.txt"]
    for row in held:
        name = {"both": "greedy", "mlp": "mlp"}[row["block_kinds"]]
        assert row["mean_perplexity"] == close(calibrated(store.runs[name], "pruned", "held.txt"))
        assert row["mean_ratio"] == store.searches[name][-1]["ratio"]
    assert len(held) == 2
    expected = defaultdict(list)
    for name, method in METHODS.items():
        bands = set()
        for step in store.searches[name]:
            band = math.floor(step["ratio"] * 20) / 20
            if band not in bands:
                bands.add(band)
                expected[(name == "seed", band, *method)].append(step["perplexity"])
    found = sorted(
        (row["ratio_from"], row["metric"], row["block_kinds"], row["mean_perplexity"])
        for row in rows
        if row not in held
    )
    flat = sorted((band, metric, kinds, fmean(values)) for (_, band, metric, kinds), values in expected.items())
    assert [row[:3] for row in found] == [row[:3] for row in flat]
    assert [row[3] for row in found] == pytest.approx([row[3] for row in flat], rel=1e-5)


def test_tasks(store: Store) -> None:
    scores = {
        (row["variant"], row["metric"]): row for row in store.runs["greedy"]["evaluations"] if row["task"] == "tiny"
    }
    dense, pruned = scores["dense", "acc"], scores["pruned", "acc"]
    (row,) = (row for row in store.ask("What did each task") if row["task"] == "tiny")
    assert (row["run_id"], row["dense"], row["pruned"]) == (store.ids["greedy"], dense["value"], pruned["value"])
    spread = math.hypot(dense["stderr"], pruned["stderr"])
    assert row["standard_errors"] == close((pruned["value"] - dense["value"]) / spread)


def test_time(store: Store) -> None:
    expected: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for run in store.runs.values():
        for stage in run["stages"]:
            counts = expected[stage["stage"]]
            counts[stage["cached"]] += 1
            counts[2] += stage["seconds"]
    rows = store.ask("Where does the time go")
    assert {r["stage"]: [r["computed"], r["cached"], r["seconds"]] for r in rows} == {
        stage: [computed, cached, close(seconds)] for stage, (computed, cached, seconds) in expected.items()
    }
    assert next(row["saved"] for row in rows if row["stage"] == "search") > 0


def test_speed(store: Store) -> None:
    speeds = {(row["variant"], row["batch_size"]): row for row in store.runs["timed"]["speed"]}
    rows = store.ask("How much faster")
    assert [row["batch_size"] for row in rows] == [1, 2]
    for row in rows:
        dense, pruned = speeds["dense", row["batch_size"]], speeds["pruned", row["batch_size"]]
        assert row["prefill_times"] == close(dense["prefill_ms"] / pruned["prefill_ms"])
        assert row["decode_times"] == close(pruned["decode_tokens_per_s"] / dense["decode_tokens_per_s"])


# --- the database made anew -------------------------------------------------------------------------------------------


def dump(database: Path) -> dict[str, list[tuple[str, ...]]]:
    """Every row of every table and view, in an order that does not depend on when it was written."""
    with duckdb.connect(database, read_only=True) as connection:
        names = [name for (name,) in connection.execute("SELECT table_name FROM information_schema.tables").fetchall()]
        return {name: sorted(map(repr, connection.execute(f'FROM "{name}"').fetchall())) for name in names}  # type: ignore[misc]


def lose(database: Path) -> None:
    database.unlink()


def tear(database: Path) -> None:
    database.write_bytes(database.read_bytes()[:5000])


def meddle(database: Path) -> None:
    with duckdb.connect(database) as connection:
        connection.execute("UPDATE runs SET name = 'mine'; DELETE FROM block_scores; DROP VIEW leaderboard")
        connection.execute("INSERT INTO exports SELECT * FROM exports; CREATE TABLE mine AS SELECT 1")


def leave(database: Path) -> None:
    """It is made anew where nothing is wrong as well."""


@pytest.mark.parametrize("damage", [lose, tear, meddle, leave])
def test_the_rebuilt_database_is_the_undisturbed_one(
    store: Store, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    undisturbed = dump(store.workspace / "results.duckdb")
    assert {"runs", "block_scores", "speed", "leaderboard"} <= undisturbed.keys()
    assert all(undisturbed[table] for table in undisturbed if table != "skipped_runs")
    copy = tmp_path / "ws"
    shutil.copytree(store.workspace, copy)
    damage(copy / "results.duckdb")
    said = blockpruner("db", "rebuild", "--workspace", copy)
    assert said.status == 0
    assert f"made anew from {len(store.runs)} run records" in said.stdout
    rebuilt = dump(copy / "results.duckdb")
    assert rebuilt.keys() == undisturbed.keys()
    for table, rows in undisturbed.items():
        moved = [row.replace(str(store.workspace), str(copy)) for row in rows]  # type: ignore[attr-defined]
        assert rebuilt[table] == moved, table


def test_after_a_prune_the_database_is_that_of_the_runs_that_are_kept(store: Store, tmp_path: Path) -> None:
    copy = tmp_path / "ws"
    shutil.copytree(store.workspace, copy)
    blockpruner("db", "rebuild", "--workspace", copy)  # the paths of exports are where the workspace is now
    gone = ["--run", "kl", "--run", store.ids["seed"]]
    freed = blockpruner("cache", "prune", *gone, "--yes", "--json", "--workspace", copy).json
    assert {entry["stage"] for entry in freed["entries"]} == {"calibrate", "search"}
    pruned = dump(copy / "results.duckdb")
    assert blockpruner("db", "rebuild", "--workspace", copy, "--json").json["runs"] == len(store.runs) - 2
    assert dump(copy / "results.duckdb") == pruned
    again = blockpruner("evaluate", "greedy", "--workspace", copy, "--json").json
    assert all(stage["cached"] for stage in again["stages"]), "what kept runs need is there"
