"""The views against rows worked out by hand, from runs whose artifacts were written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages.runs import RunDescription, RunRecord, StageRun
from tests.unit.store_lab import Lab

BLOCKS = ["mha:0", "mlp:0", "mha:1", "mlp:1"]
RATIO = {"mha": 0.1, "mlp": 0.2}


class ViewLab(Lab):
    """Runs of two layers: attention is a tenth of the parameters, feed-forward a fifth."""

    def searched(
        self, order: str, perplexities: list[float], name: str = "run", eval_text: str = "text-a", **more: Any
    ) -> RunRecord:
        """A finished run whose search removed `order` ('mha:1 mlp:0'); the calibration's dense perplexity is 10.

        `more`: `pruned` (perplexity of the export on the text w, dense 20), `accuracy` (dense, pruned), `tasks` (other
        ones), `cached`, `family` (of searches that go the same way; else each its own), `settings` of the search,
        `content` (of the pruned model; else its search's), `calibrated_on` (the set's fingerprint), and fields of the
        run.
        """
        pruned, accuracy = more.pop("pruned", None), more.pop("accuracy", None)
        measured_tasks, settings = more.pop("tasks", metrics), more.pop("settings", None)
        content, target = more.pop("content", None), more.pop("target", "")
        was_cached, seconds = more.pop("cached", False), more.pop("seconds", 8.0)
        calibration = self.calibrated("calibration", more.pop("calibrated_on", "calib-a"))
        given = {"model": "m", "model_fingerprint": "M", "strategy": "blockpruner", "metric": "perplexity",
                 "block_kinds": "both", "device": "cpu"}  # fmt: skip
        family = more.pop("family", f"{order} {perplexities}")
        record = self.runs.create(RunDescription(name=name, **{**given, **more}))
        salt = f"{family} {order} {perplexities} {target}"
        steps = trace(order, perplexities)
        search = self.artifact("search", {"dense_perplexity": 10.0}, salt, config=settings, trace__jsonl=steps)
        search.checkpoints = family
        record.stages = [calibration, self.calibrated("text:w", eval_text), search]
        search.cached, search.seconds = was_cached, 0.5 if was_cached else seconds
        if pruned is not None:
            removed = len(order.split())
            export = {
                "format": "stock",
                "num_blocks_removed": removed,
                "num_parameters": 1,
                "bytes": 1,
                "verified": True,
            }
            record.stages.append(self.artifact("export", export, salt))
            dense = {"texts": [{"text": "w", "num_tokens": 9, "perplexity": 20.0}]}
            record.stages.append(self.artifact("baseline", dense, eval_text))
            measured: dict[str, Any] = {"texts": [{"text": "w", "num_tokens": 9, "perplexity": pruned}]}
            if accuracy:
                measured["metrics"] = measured_tasks(accuracy[1])
                salt += measured_tasks.__name__
                record.stages.append(self.artifact("evaluate:dense", {"metrics": measured_tasks(accuracy[0])}, salt))
            content = content or f"{family} {removed}"
            record.stages.append(self.artifact("evaluate:pruned", measured, salt + eval_text, model=content))
        self.runs.finish(record, "completed")
        assert self.results.ingest(record)
        assert self.said == []
        return record

    def calibrated(self, role: str, fingerprint: str) -> StageRun:
        return StageRun(stage="calibrate", label=role, role=role, fingerprint=fingerprint, status="completed")

    def view(self, name: str, *columns: str, where: str = "true") -> list[tuple[Any, ...]]:
        return self.results.query(f"SELECT {', '.join(columns)} FROM {name} WHERE {where}").rows


def trace(order: str, perplexities: list[float]) -> str:
    lines, left, ratio = [], list(BLOCKS), 0.0
    for step, (block, perplexity) in enumerate(zip(order.split(), perplexities, strict=True), start=1):
        kind, layer = block.split(":")
        ratio += RATIO[kind]
        ranked = [block, *(other for other in left if other != block)]
        candidates = [
            {"block": {"block_kind": b[:3], "layer_index": b[4:]}, "score": rank, "perplexity": rank, "rank": rank,
             "chosen": b == block}
            for rank, b in enumerate(ranked, start=1)
        ]  # fmt: skip
        left.remove(block)
        lines.append(
            json.dumps({"step": step, "block": {"block_kind": kind, "layer_index": layer}, "score": perplexity,
                        "perplexity": perplexity, "num_parameters_removed": 0, "ratio": ratio, "seconds": 1.0,
                        "candidates": candidates})
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def metrics(accuracy: float) -> list[dict[str, Any]]:
    """Two tasks; one has both metrics, of which acc_norm counts. Their mean is `accuracy`."""
    return [
        {"task": "arc", "metric": "acc", "value": 0.01},
        {"task": "arc", "metric": "acc_norm", "value": accuracy + 0.1},
        {"task": "piqa", "metric": "acc", "value": accuracy - 0.1},
        {"task": "lambada", "metric": "perplexity", "value": 99.0},
    ]


@pytest.fixture
def lab(tmp_path: Path) -> ViewLab:
    return ViewLab(tmp_path / "workspace")


# --- perplexity_by_ratio ----------------------------------------------------------------------------------------------


def test_every_step_on_the_calibration_set_and_two_points_on_a_text(lab: ViewLab) -> None:
    lab.searched("mha:1 mlp:0", [11.0, 13.0], pruned=24.0)
    assert lab.view(
        "perplexity_by_ratio", "text", "num_blocks_removed", "round(ratio, 9)", "perplexity", "times_dense"
    ) == [
        ("calibration", 0, 0.0, 10.0, 1.0),
        ("calibration", 1, 0.1, 11.0, 1.1),
        ("calibration", 2, 0.3, 13.0, 1.3),
        ("w", 0, 0.0, 20.0, 1.0),
        ("w", 2, 0.3, 24.0, 1.2),
    ]


def test_a_search_alone_has_its_curve(lab: ViewLab) -> None:
    lab.searched("mha:1", [11.0])
    assert lab.view("perplexity_by_ratio", "text", "num_blocks_removed", "times_dense") == [
        ("calibration", 0, 1.0),
        ("calibration", 1, 1.1),
    ]


# --- leaderboard ------------------------------------------------------------------------------------------------------


def test_ranks_count_who_removed_as_much_and_lost_less(lab: ViewLab) -> None:
    lab.searched("mha:1", [11.0], "small", pruned=21.0)
    lab.searched("mha:0", [12.0], "small and worse", pruned=23.0)
    lab.searched("mha:1 mlp:0", [11.0, 13.0], "large", pruned=22.0)
    lab.searched("mlp:1 mlp:0", [14.0, 19.0], "largest", pruned=40.0)
    ranks = lab.view("leaderboard", "name", "rank", where="text = 'w'")
    assert dict(ranks) == {"small": 1, "large": 1, "largest": 1, "small and worse": 3}


def test_what_came_from_the_cache_is_listed_once(lab: ViewLab) -> None:
    lab.searched("mha:1", [11.0], "first", pruned=21.0, accuracy=(0.8, 0.6))
    lab.searched("mha:1", [11.0], "again", pruned=21.0, accuracy=(0.8, 0.6), cached=True)
    lab.searched("mha:1", [11.0], "without tasks", pruned=21.0, cached=True)
    columns = ("name", "round(pruned_accuracy, 9)", "round(dense_accuracy, 9)", "tasks")
    assert lab.view("leaderboard", *columns, where="text = 'w'") == [("again", 0.6, 0.8, "arc, piqa")]


def test_the_evaluations_own_average_goes_before_ours(lab: ViewLab) -> None:
    """It knows of groups, whose members do not count beside them."""
    record = lab.searched("mha:1", [11.0], pruned=21.0, accuracy=(0.8, 0.6))
    average = {"task": "average", "metric": "acc_norm or acc", "value": 0.55}
    text = {"text": "w", "num_tokens": 9, "perplexity": 21.0}
    record.stages[-1] = lab.artifact("evaluate:pruned", {"texts": [text], "metrics": [*metrics(0.6), average]}, "own")
    lab.results.ingest(record)
    columns = ("pruned_accuracy", "round(dense_accuracy, 9)", "tasks")
    assert lab.view("leaderboard", *columns, where="text = 'w'") == [(0.55, 0.8, "arc, piqa")]


def test_another_text_of_the_same_name_and_another_model_are_not_compared(lab: ViewLab) -> None:
    lab.searched("mha:1", [11.0], "one", pruned=21.0)
    lab.searched("mha:0", [11.5], "other text", pruned=9.0, eval_text="text-b")
    lab.searched("mlp:0", [11.7], "other model", pruned=8.0, model_fingerprint="N")
    assert {rank for (rank,) in lab.view("leaderboard", "rank", where="text = 'w'")} == {1}


# --- block_redundancy -------------------------------------------------------------------------------------------------


def test_redundancy_is_how_early_a_block_goes(lab: ViewLab) -> None:
    lab.searched("mha:1 mlp:0", [11.0, 13.0])
    lab.searched("mlp:0 mha:0 mha:1 mlp:1", [12.0, 13.0, 14.0, 15.0], calibration="other")
    columns = (
        "block_kind || ':' || layer_index",
        "num_searches",
        "num_removed",
        "first_step",
        "mean_step",
        "redundancy",
    )
    assert lab.view("block_redundancy", *columns, "mean_first_rank") == [
        ("mlp:0", 2, 2, 1, 1.5, (1 / 2 + 1) / 2, 2.0),
        ("mha:1", 2, 2, 1, 2.0, (1 + 1 / 2) / 2, 2.0),
        ("mha:0", 2, 1, 2, 2.0, (0 + 3 / 4) / 2, 2.0),
        ("mlp:1", 2, 1, 4, 4.0, (0 + 1 / 4) / 2, 4.0),
    ]


def test_a_search_that_another_continues_counts_with_it(lab: ViewLab) -> None:
    lab.searched("mha:1", [11.0], family="f")
    lab.searched("mha:1 mlp:0", [11.0, 13.0], family="f")
    lab.searched("mha:1 mlp:0", [11.0, 13.0], family="f", cached=True)
    lab.searched("mha:1", [7.0], metric="kl")  # another search
    columns = ("block_kind || ':' || layer_index", "num_searches", "num_removed", "redundancy")
    rows = lab.view("block_redundancy", *columns, where="num_removed > 0")
    assert rows == [("mha:1", 2, 2, 1.0), ("mlp:0", 2, 1, 0.25)]


def test_models_and_strategies_stand_apart(lab: ViewLab) -> None:
    lab.searched("mha:1", [11.0])
    lab.searched("mha:0", [11.0], strategy="shortgpt")
    lab.searched("mlp:0", [11.0], model="n", model_fingerprint="N")
    first = lab.view("block_redundancy", "model", "strategy", "block_kind", "layer_index", where="redundancy = 1")
    assert first == [("m", "blockpruner", "mha", 1), ("m", "shortgpt", "mha", 0), ("n", "blockpruner", "mlp", 0)]


# --- method_comparison ------------------------------------------------------------------------------------------------


def test_methods_side_by_side_at_the_same_share(lab: ViewLab) -> None:
    lab.searched("mha:1 mlp:0", [11.0, 13.0], pruned=24.0, accuracy=(0.8, 0.6))
    lab.searched("mlp:1", [15.0], strategy="oneshot", pruned=30.0)
    lab.searched("mha:0 mlp:1", [12.0, 19.5], strategy="random", seed=1)
    lab.searched("mha:1 mlp:1", [11.0, 32.5], strategy="random", seed=2)
    columns = ("text", "ratio_from", "strategy", "num_models", "mean_perplexity", "best_perplexity", "worst_perplexity")
    assert lab.view("method_comparison", *columns, "times_blockpruner", "round(mean_accuracy, 9)") == [
        ("calibration", 0.1, "blockpruner", 1, 11.0, 11.0, 11.0, 1.0, None),
        ("calibration", 0.1, "random", 2, 11.5, 11.0, 12.0, 11.5 / 11, None),
        ("calibration", 0.2, "oneshot", 1, 15.0, 15.0, 15.0, None, None),
        ("calibration", 0.3, "blockpruner", 1, 13.0, 13.0, 13.0, 1.0, 0.6),
        ("calibration", 0.3, "random", 2, 26.0, 19.5, 32.5, 2.0, None),
        ("w", 0.2, "oneshot", 1, 30.0, 30.0, 30.0, None, None),
        ("w", 0.3, "blockpruner", 1, 24.0, 24.0, 24.0, 1.0, 0.6),
    ]


def test_methods_know_the_comparisons_that_they_are_rows_of(lab: ViewLab) -> None:
    lab.searched("mha:1", [11.0], comparison="b")
    lab.searched("mha:1", [11.0], name="the same again", comparison="a")
    lab.searched("mha:1", [11.0], name="alone")
    lab.searched("mha:0", [12.0], strategy="oneshot")
    where = "list_contains(comparisons, 'a')"
    assert lab.view("method_comparison", "strategy", "num_models", "comparisons", where=where) == [
        ("blockpruner", 1, ["a", "b"])
    ]
    assert lab.view("method_comparison", "comparisons", where="strategy = 'oneshot'") == [([],)]
    points = lab.view("perplexity_by_ratio", "name", "comparison", where="num_blocks_removed > 0")
    assert sorted(points, key=str) == [("alone", None), ("run", "b"), ("run", None), ("the same again", "a")]


def test_of_models_that_go_the_same_way_the_first_in_a_step_counts(
    lab: ViewLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RATIO, "mha", 0.02)
    lab.searched("mha:1", [11.0], "first", pruned=21.0, family="f")
    lab.searched("mha:1 mha:0", [11.0, 12.0], "further", pruned=29.0, family="f")
    columns = ("text", "ratio_from", "num_models", "mean_perplexity", "mean_ratio")
    assert lab.view("method_comparison", *columns) == [("calibration", 0.0, 1, 11.0, 0.02), ("w", 0.0, 1, 21.0, 0.02)]


# --- stage_cost -------------------------------------------------------------------------------------------------------


def test_what_stages_cost_and_what_the_cache_saved(lab: ViewLab) -> None:
    lab.searched("mha:1", [11.0], seconds=8.0)
    lab.searched("mha:0", [12.0], seconds=4.0)
    lab.searched("mha:1", [11.0], cached=True)
    failed = lab.searched("mha:1", [11.0], cached=True)
    failed.stages = [StageRun(stage="search", label="search", role="search", status="failed", seconds=2.0)]
    lab.runs.finish(failed, "failed")
    lab.results.ingest(failed)
    (row,) = lab.view(
        "stage_cost", "model", "device", "num_computed", "num_cached", "num_failed", "total_seconds", "mean_seconds",
        "longest_seconds", "saved_seconds", where="stage = 'search'",
    )  # fmt: skip
    assert row == ("m", "cpu", 2, 1, 1, 8 + 4 + 0.5 + 2, 6.0, 8.0, 7.5)


# --- steps that remove several blocks ---------------------------------------------------------------------------------


def test_a_step_may_take_several_blocks(lab: ViewLab) -> None:
    """A strategy that removes whole layers has a row for each block of a step, with the step's numbers."""
    record = lab.searched("mha:1 mlp:1 mha:0", [12.0, 12.0, 14.0])
    search = record.stage("search")
    assert search is not None
    lines = trace("mha:1 mlp:1 mha:0", [12.0, 12.0, 14.0]).splitlines()
    rows = [json.loads(line) for line in lines]
    for row, step, ratio in zip(rows, (1, 1, 2), (0.3, 0.3, 0.4), strict=True):
        row["step"], row["ratio"] = step, ratio
        row["candidates"].append({**row["candidates"][-1], "rank": 9})  # a block may be part of several candidates
    record.stages = [
        lab.artifact("search", {"dense_perplexity": 10.0}, "l", trace__jsonl="\n".join(map(json.dumps, rows)))
    ]
    lab.results.ingest(record)
    assert lab.view("perplexity_by_ratio", "num_blocks_removed", "ratio", "perplexity") == [
        (0, 0.0, 10.0),
        (2, 0.3, 12.0),
        (3, 0.4, 14.0),
    ]
    columns = ("layer_index", "block_kind", "redundancy", "num_searches")
    assert lab.view("block_redundancy", *columns, where="num_removed > 0") == [
        (1, "mha", 1.0, 1),
        (1, "mlp", 1.0, 1),
        (0, "mha", 0.5, 1),
    ]
    assert lab.view("block_redundancy", *columns, where="num_removed = 0") == [(0, "mlp", 0.0, 1)]
