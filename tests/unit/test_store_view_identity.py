"""What the views take for one search, model, method, text and set of tasks: and what they must not merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stages.runs import RunDescription, RunRecord
from tests.unit.test_store_views import RATIO, ViewLab

LACO: dict[str, Any] = {"strategy": "laco", "metric": "dissimilarity"}
RANDOM: dict[str, Any] = {"strategy": "random", "metric": "chance"}


@pytest.fixture
def lab(tmp_path: Path) -> ViewLab:
    return ViewLab(tmp_path / "workspace")


def one_other_task(accuracy: float) -> list[dict[str, Any]]:
    return [{"task": "winogrande", "metric": "acc", "value": accuracy}]


def fewer_questions(accuracy: float) -> list[dict[str, Any]]:
    return [{"task": "winogrande", "metric": "acc", "value": accuracy, "num_examples": 10, "num_fewshot": 5}]


def external(lab: ViewLab, perplexity: float, name: str = "ext", own_text: str | None = None) -> RunRecord:
    """A run that measured a checkpoint of 75 parameters of 100; `own_text`: the tokens its own tokenizer makes of w."""
    about = RunDescription(name=name, model="m", model_fingerprint="M", strategy="SliceGPT", external="/x",
                           num_parameters=100, num_parameters_left=75)  # fmt: skip
    record = lab.runs.create(about)
    dense = {"texts": [{"text": "w", "num_tokens": 9, "perplexity": 20.0}]}
    measured = {"texts": [{"text": "w", "num_tokens": 9, "perplexity": perplexity}]}
    record.stages = [lab.calibrated("calibration", "calib-a"), lab.calibrated("text:w", "text-a")]
    if own_text:
        record.stages += [lab.calibrated("external:text:w", own_text)]
    record.stages.append(lab.artifact("baseline", dense, "text-a"))
    record.stages.append(lab.artifact("evaluate:pruned", measured, f"{name} {perplexity} {own_text}", model="sliced"))
    lab.runs.finish(record, "completed")
    assert lab.results.ingest(record)
    assert lab.said == []
    return record


# --- one search -------------------------------------------------------------------------------------------------------


def test_draws_are_not_merged_because_their_blocks_are(lab: ViewLab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RATIO, "mlp", 0.01)
    lab.searched("mha:1", [20.0], "draw 0", family="0", **RANDOM)
    lab.searched("mlp:0 mha:1", [11.0, 40.0], "draw 1", family="1", **RANDOM)
    lab.searched("mha:1", [20.0], "draw 2, by chance as draw 0", family="2", **RANDOM)
    columns = ("num_models", "round(mean_perplexity, 3)", "worst_perplexity")
    found = lab.view("method_comparison", *columns, where="ratio_from = 0.1")
    assert found == [(3, 26.667, 40.0)]  # 10 to 15 %: {mha:1}, {mlp:0, mha:1}, {mha:1}


def test_a_draw_that_begins_as_another_is_a_search_of_its_own(lab: ViewLab) -> None:
    lab.searched("mha:1", [20.0], "draw 0", family="0", **RANDOM)
    lab.searched("mha:1 mlp:0", [20.0, 30.0], "draw 1", family="1", **RANDOM)
    columns = ("layer_index", "block_kind", "num_searches", "num_removed", "redundancy")
    assert lab.view("block_redundancy", *columns, where="num_removed > 0") == [
        (1, "mha", 2, 2, 1.0),
        (0, "mlp", 2, 1, 0.25),
    ]


def test_a_record_of_an_earlier_version_is_known_by_its_search(lab: ViewLab) -> None:
    record = lab.searched("mha:1", [11.0])
    search = record.stage("search")
    assert search is not None
    search.checkpoints = None
    lab.results.ingest(record)
    assert lab.view("runs", "search_family") == [(search.fingerprint,)]


def test_layers_that_were_merged_were_not_removed(lab: ViewLab) -> None:
    lab.searched("mha:1 mlp:1", [11.0, 12.0], **LACO)
    assert lab.view("block_redundancy", "*") == []


# --- one method -------------------------------------------------------------------------------------------------------


def test_a_methods_settings_are_part_of_its_name(lab: ViewLab) -> None:
    settings = {"layers_per_merge": 2, "first_layer": 0, "last_layer": None, "interval": 1, "threshold": 0.5}
    for perplexity, merged in ((20.0, 2), (60.0, 3)):
        laco = {"laco": {**settings, "layers_per_merge": merged}}
        lab.searched("mha:1 mlp:1", [11.0, perplexity], pruned=perplexity, settings=laco, **LACO)
    lab.searched("mha:1 mlp:0", [11.0, 20.0], "paper", pruned=30.0)
    lab.searched("mha:0 mlp:0", [15.0, 60.0], "in pairs", pruned=90.0, settings={"stock_compatible_at": "2"})
    columns = ("strategy", "settings", "num_models", "mean_perplexity", "times_blockpruner")
    assert lab.view("method_comparison", *columns, where="text = 'w'") == [
        ("laco", "C=2, L=0, I=1, T=0.5", 1, 20.0, 20 / 30),
        ("blockpruner", None, 1, 30.0, 1.0),
        ("laco", "C=3, L=0, I=1, T=0.5", 1, 60.0, 2.0),
        ("blockpruner", "stock-compatible", 1, 90.0, 3.0),
    ]


# --- one model --------------------------------------------------------------------------------------------------------


def test_a_better_model_counts_once_however_often_it_was_measured(lab: ViewLab) -> None:
    best: dict[str, Any] = {"pruned": 30.0, "family": "best"}
    lab.searched("mha:1 mlp:0", [11.0, 12.0], "ratio 0.25", accuracy=(0.8, 0.7), **best)
    lab.searched("mha:1 mlp:0", [11.0, 12.0], "other tasks", accuracy=(0.8, 0.7), tasks=one_other_task, **best)
    lab.searched("mha:1 mlp:0", [11.0, 12.0], "ratio 0.30", target="0.30", **best)
    lab.searched("mha:1 mlp:0", [11.0, 12.0], "the same blocks", pruned=30.0, strategy="oneshot", content="best 2")
    lab.searched("mha:0 mlp:1", [11.5, 12.5], "second", pruned=40.0)
    lab.searched("mha:0 mlp:0", [12.5, 13.5], "third, not evaluated on w", strategy="layers")
    found = lab.view("leaderboard", "name", "rank", where="text = 'w'")
    assert dict(found) == {"ratio 0.25": 1, "other tasks": 1, "the same blocks": 1, "second": 2}
    ranks = dict(lab.view("leaderboard", "name", "rank", where="text = 'calibration'"))
    assert ranks["third, not evaluated on w"] == 3


def test_a_model_that_searches_to_several_targets_reach_counts_once(lab: ViewLab) -> None:
    """A stock-compatible search is another one for each target."""

    def searched(order: str, perplexities: list[float], pruned: float, target: str, **more: Any) -> None:
        family = f"{target} {more.get('calibrated_on')}"
        lab.searched(
            order, perplexities, pruned=pruned, settings={"stock_compatible_at": target}, family=family, **more
        )

    searched("mha:0 mlp:0", [11.0, 13.0], 30.0, "2", accuracy=(0.8, 0.7), comparison="b")
    searched("mha:0 mlp:0", [11.0, 13.0], 30.0, "0.3", comparison="a")
    searched("mha:0 mlp:1", [11.0, 16.0], 42.0, "0.31")  # another model
    searched("mha:0 mlp:0", [12.0, 19.0], 30.0, "2", calibrated_on="calib-b")  # another draw of the method
    columns = ("text_fingerprint", "num_models", "mean_perplexity", "round(mean_accuracy, 9)", "comparisons")
    assert lab.view("method_comparison", *columns, where="text_fingerprint <> 'calib-b'") == [
        ("calib-a", 1, 11.0, None, ["a", "b"]),
        ("calib-a", 2, 14.5, 0.7, ["a", "b"]),
        ("text-a", 3, 34.0, 0.7, ["a", "b"]),
    ]


def test_a_search_that_was_not_evaluated_is_the_model_that_was(lab: ViewLab) -> None:
    lab.searched("mha:1", [11.0], "evaluated", pruned=21.0, family="f")
    lab.searched("mha:1", [11.0], "searched alone", family="f")
    lab.searched("mha:0", [12.0], "worse")
    found = lab.view("leaderboard", "name", "rank", where="text = 'calibration'")
    assert sorted(found) == [("searched alone", 1), ("worse", 2)]


def test_a_model_has_one_name_however_it_was_typed(lab: ViewLab) -> None:
    lab.searched("mha:1", [11.0], pruned=21.0, model="./m")
    lab.searched("mlp:1", [15.0], pruned=30.0, model="/home/m", strategy="oneshot")
    lab.searched("mlp:1", [16.0], pruned=30.0, model="/home/n", model_fingerprint="N")
    for view in ("perplexity_by_ratio", "leaderboard", "block_redundancy", "method_comparison", "stage_cost"):
        assert sorted(set(lab.view(view, "model", "model_fingerprint"))) == [("./m", "M"), ("/home/n", "N")], view


# --- models that were pruned elsewhere --------------------------------------------------------------------------------


def test_a_model_that_was_pruned_elsewhere_stands_beside_the_others(lab: ViewLab) -> None:
    lab.searched("mlp:1", [11.0], "ours", pruned=24.0)  # a fifth
    external(lab, 25.0, "measured before")
    external(lab, 30.0)
    columns = ("name", "strategy", "rank", "ratio", "perplexity", "times_dense", "num_blocks_removed")
    assert lab.view("leaderboard", *columns, where="text = 'w'") == [
        ("ext", "SliceGPT", 1, 0.25, 30.0, 1.5, None),
        ("ours", "blockpruner", 1, 0.2, 24.0, 1.2, 1),
    ]
    columns = ("strategy", "ratio_from", "num_models", "mean_perplexity", "mean_ratio")
    assert lab.view("method_comparison", *columns, where="text = 'w'") == [
        ("blockpruner", 0.2, 1, 24.0, 0.2),
        ("SliceGPT", 0.25, 1, 30.0, 0.25),
    ]
    points = lab.view("perplexity_by_ratio", "ratio", "perplexity", where="name = 'ext'")
    assert sorted(points) == [(0.0, 20.0), (0.25, 30.0)]


def test_other_tokens_are_another_text(lab: ViewLab) -> None:
    lab.searched("mlp:1", [11.0], "ours", pruned=24.0)
    external(lab, 5.0, own_text="text-b")
    columns = ("name", "rank", "times_dense", "text_fingerprint")
    assert sorted(lab.view("leaderboard", *columns, where="text = 'w'")) == [
        ("ext", 1, None, "text-b"),
        ("ours", 1, 1.2, "text-a"),
    ]


def test_a_text_is_known_by_its_tokens(lab: ViewLab) -> None:
    record = external(lab, 15.0)
    for role, salt in (("text:w", "one file"), ("external:text:w", "another file")):
        record.stages.append(lab.artifact(role, {"token_digest": "the same tokens"}, salt))
    lab.results.ingest(record)
    columns = ("ratio", "times_dense", "text_fingerprint")
    assert lab.view("perplexity_by_ratio", *columns, where="text = 'w'") == [
        (0.0, 1.0, "the same tokens"),
        (0.25, 0.75, "the same tokens"),
    ]


# --- one set of tasks -------------------------------------------------------------------------------------------------


def test_accuracies_over_other_tasks_are_not_averaged(lab: ViewLab) -> None:
    lab.searched("mha:1 mlp:0", [11.0, 20.0], "a", pruned=30.0, accuracy=(0.8, 0.7))
    lab.searched("mha:0 mlp:0", [11.0, 21.0], "b", pruned=31.0, accuracy=(0.4, 0.3), tasks=one_other_task)
    lab.searched("mha:0 mlp:1", [11.0, 22.0], "c", pruned=32.0, accuracy=(0.8, 0.5))
    lab.searched("mha:1 mlp:1", [11.0, 23.0], "d", pruned=33.0, accuracy=(0.9, 0.9), tasks=one_other_task,
                 strategy="oneshot")  # fmt: skip
    lab.searched("mlp:1 mha:1", [11.0, 24.0], "e", pruned=34.0, accuracy=(0.8, 0.1))
    columns = ("strategy", "num_models", "round(mean_accuracy, 3)", "tasks")
    assert lab.view("method_comparison", *columns, where="text = 'w'") == [
        ("blockpruner", 4, 0.433, "arc, piqa"),  # a, c and e
        ("oneshot", 1, None, None),
    ]


def test_a_task_with_fewer_questions_is_another_set(lab: ViewLab) -> None:
    lab.searched("mha:1 mlp:0", [11.0, 20.0], "all", pruned=30.0, accuracy=(0.8, 0.7), tasks=one_other_task, family="f")
    lab.searched("mha:1 mlp:0", [11.0, 20.0], "ten", pruned=30.0, accuracy=(0.8, 0.1), tasks=fewer_questions,
                 family="f")  # fmt: skip
    columns = ("name", "tasks", "num_questions", "pruned_accuracy")
    assert sorted(lab.view("leaderboard", *columns, where="text = 'w'")) == [
        ("all", "winogrande", None, 0.7),
        ("ten", "winogrande (5-shot)", 10, 0.1),
    ]
