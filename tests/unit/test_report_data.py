"""What the report takes from several runs: names, one map a search, what related runs measured, the paper's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from flows.grid import External, load_comparison
from flows.paper_figures import paper_figures
from flows.recipe import make_recipe
from flows.render import sparkline
from flows.report.bars import speed_bars, task_bars
from flows.report.build import Report
from flows.report.curves import held_out_curves, search_curves
from flows.report.data import accuracies, distinct_searches, report_runs
from flows.report.paper import comparisons
from flows.report.picture import plain
from flows.report.related import with_related
from flows.report.reproduce import commands, recipe_text
from flows.report.theme import DARK, LIGHT, Theme
from flows.results_table import results_table
from flows.summary import RunSummary
from flows.vector_pictures import blocks_svg, data_uri, perplexity_svg
from stages.runs import RunRecord
from stages.store_schema import EvaluationRow
from stages.workspace import Workspace
from tests.unit.store_lab import STEP_1, STEP_2, TRACE, Lab, trace_step

LLAMA = "meta-llama/Llama-2-7b-hf"
FIVE = dict(zip(paper_figures().tasks, (0.70, 0.60, 0.65, 0.55, 0.40), strict=True))
SPEED = {"machine": "m", "speeds": [
    {"variant": variant, "batch_size": 1, "prompt_tokens": 128, "new_tokens": 32, "prefill_ms": ms,
     "decode_tokens_per_s": 9.0, "peak_memory_bytes": 5, "kv_cache_bytes_per_token": 2.0}
    for variant, ms in (("dense", 4.0), ("pruned", 3.0))]}  # fmt: skip


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "ws")


def summary(lab: Lab, record: RunRecord) -> RunSummary:
    return RunSummary.of(record, lab.runs.workspace, lab.said.append)


def of_the_paper(lab: Lab, **changes: Any) -> RunRecord:
    """A run with the paper's settings, of which everything was measured by hand."""
    record = lab.run("ours", roles="bsxd")
    metrics = [
        {"task": task, "metric": metric, "value": value - less, "stderr": 0.01, "num_fewshot": 0}
        for task, value in FIVE.items()
        for metric, less in (("acc", 0.1), ("acc_norm", 0.0))
    ]
    texts = [{"text": "wikitext2", "num_tokens": 900, "perplexity": 11.0}]
    record.stages.append(lab.artifact("evaluate:pruned", {"texts": texts, "metrics": metrics}, "paper"))
    settings = {"model": LLAMA, "num_layers": 32, "num_parameters": 1000, "sequence_length": 2048, **changes}
    return record.model_copy(update=settings)


def contrast(one: str, other: str) -> float:
    """WCAG 2.2: relative luminance of the lighter over that of the darker, both plus 0.05."""

    def luminance(color: str) -> float:
        parts = [part / 255 for part in bytes.fromhex(color[1:])]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_colours_stand_out_from_the_page(theme: Theme) -> None:
    assert min(contrast(color, theme.surface) for color in (*theme.series, theme.dense, theme.chosen)) >= 3.0
    assert min(contrast(color, theme.surface) for color in (theme.text, theme.muted)) >= 4.5
    steps = [contrast(color, theme.surface) for color in theme.scale]
    assert steps == sorted(steps)  # luminance alone tells the order


def test_runs_of_one_name_are_told_apart(lab: Lab) -> None:
    first, second, other = lab.run("night"), lab.run("night"), lab.run("day")
    runs = report_runs([summary(lab, record) for record in (first, second, other, first)])
    assert [run.label for run in runs] == [f"night {first.run_id[-6:]}", f"night {second.run_id[-6:]}", "day"]


def test_one_map_for_runs_that_share_a_search(lab: Lab) -> None:
    shorter = lab.run("shorter", roles="")
    first_step = TRACE.splitlines()[0] + "\n"
    shorter.stages = [lab.artifact("search", {"dense_perplexity": 5.0}, "short", trace__jsonl=first_step)]
    longer, same = lab.run("longer", roles="s"), lab.run("same", roles="s")
    changed = lab.run("changed", roles="")
    other_trace = trace_step(1, STEP_2, ("mlp", 0)) + "\n" + trace_step(2, STEP_1, ("mha", 1)) + "\n"
    changed.stages = [lab.artifact("search", {"dense_perplexity": 5.0}, "other", trace__jsonl=other_trace)]
    runs = report_runs([summary(lab, record) for record in (shorter, longer, same, changed)])
    runs_of_one_model = [run for run in runs if run.model_key == runs[0].model_key]
    assert [run.label for run in distinct_searches(runs_of_one_model)] == ["longer", "changed"]


def test_what_a_later_run_measured_of_the_same_export_is_there(lab: Lab) -> None:
    evaluated = lab.run("night", roles="bsxdp")
    timed = lab.run("timed", roles="")
    timed.stages = [*evaluated.stages[1:3], lab.artifact("speed", SPEED, "speed")]
    lab.runs.save(timed)
    stranger = lab.run("stranger", roles="sx")
    stranger.stages.append(lab.artifact("speed", {**SPEED, "machine": "another"}, "stranger"))
    lab.runs.save(stranger)
    found = summary(lab, with_related(evaluated, lab.runs.list()))
    assert [row.machine for row in found.rows.speed] == ["m", "m"]
    assert len(found.rows.evaluations) == 2
    assert with_related(evaluated, []) == evaluated
    related = with_related(timed, lab.runs.list())
    assert related.stage("evaluate:pruned") is not None
    shown = RunSummary.of(related, Workspace(lab.workspace), pytest.fail, alone=timed)
    assert commands(timed) in Report.of([shown]).page.details[0].script, "what others measured is not done again"
    assert commands(related) != commands(timed)
    assert found.record.run_id == evaluated.run_id


def test_speeds_without_a_peak_of_memory_and_with_windows_have_the_bars_that_are_known(lab: Lab) -> None:
    rows: list[dict[str, Any]] = [
        {**row, "prompt_tokens": length, "peak_memory_bytes": None, "kv_cache_bytes_per_token": value}
        for row in SPEED["speeds"]
        for length, value in ((8, 4.0), (64, 3.0 if row["variant"] == "dense" else 4.0))
    ]
    timed = lab.run("timed", roles="sx")
    timed.stages.append(lab.artifact("speed", {"machine": "m", "speeds": rows}, "windows"))
    pictures = {picture.name: picture for picture in speed_bars(report_runs([summary(lab, timed)]))}
    assert list(pictures) == ["speed-prefill", "speed-decode", "speed-kv-cache"]
    dense, pruned = pictures["speed-kv-cache"].draw(LIGHT)["data"]
    assert list(dense["y"]) == list(pruned["y"]) == ["batch 1, prompt 8", "batch 1, prompt 64"]
    assert (list(dense["x"]), list(pruned["x"])) == ([4.0, 3.0], [4.0, 4.0])


def test_among_several_runs_speeds_say_whose_they_are(lab: Lab) -> None:
    timed, other = lab.run("timed", roles="sx"), lab.run("other", roles="sx")
    timed.stages.append(lab.artifact("speed", SPEED, "speed"))
    runs = report_runs([summary(lab, timed), summary(lab, other)])
    assert [[bar["name"] for bar in picture.draw(LIGHT)["data"]] for picture in speed_bars(runs)] == [
        ["dense", "timed"]
    ] * 4


def test_values_that_are_not_finite_leave_a_gap(lab: Lab) -> None:
    report = Report.of([summary(lab, lab.run())])
    pictures = {picture.name: picture.draw(LIGHT)["data"] for picture in report.pictures}
    assert pictures["perplexity-search"][0]["y"] == [5.0, 6.0, 7.0]
    assert pictures["perplexity-text-1"][0]["y"] == [5.47, None]  # the pruned model's is infinite
    assert list(pictures) == ["perplexity-search", "perplexity-text-1", "removed-blocks", "block-scores-1",
                              "task-accuracy", "stage-time"]  # fmt: skip
    mlp = [trace for trace in pictures["block-scores-1"] if trace["type"] == "heatmap"][1]["z"]
    assert mlp[0][1] is None  # NaN at step 1


def test_a_run_that_failed_has_a_page_with_its_error(lab: Lab) -> None:
    record = lab.run("broken", status="failed", roles="")
    record.error = "no such <model>"
    report = Report.of([summary(lab, record)])
    assert report.pictures == []
    assert report.page.details[0].error == "failed: no such <model>"


def test_the_papers_figures_stand_beside_ours(lab: Lab) -> None:
    runs = report_runs([summary(lab, of_the_paper(lab))])
    (comparison,) = comparisons(runs)
    rows = {(row[0], row[1]): row[2:] for row in reversed(comparison.table.rows)}
    assert rows["blockpruner", "paper"] == (0.2199, 11.51, 60.17)
    assert rows["rm", "paper"] == (None, 676.80, 37.98)
    assert rows["dense", "paper"] == (0.0, 5.47, 68.96)
    assert rows["dense", "us"] == (0.0, 5.47, None)
    assert rows["pruned: ours", "us"] == pytest.approx((0.3, 11.0, 58.0))  # 100 * mean of FIVE, acc_norm
    assert comparison.differences == ()
    (picture,) = held_out_curves(runs, [comparison.paper])
    ours, published = picture.draw(LIGHT)["data"]
    assert (ours["x"], ours["y"]) == (pytest.approx([0.0, 0.3]), [5.47, 11.0])
    assert (published["x"], published["y"]) == ([0.0, 0.2199], [5.47, 11.51])


def test_what_is_not_as_in_the_paper_is_said(lab: Lab) -> None:
    record = of_the_paper(lab, sequence_length=128, config={"limit": 7, "num_fewshot": 5, "calibration": "alpaca"})
    record.stages.append(lab.artifact("evaluate:pruned", {"texts": [], "metrics": []}, "nothing"))
    (comparison,) = comparisons(report_runs([summary(lab, record)]))
    assert [line.partition(": ")[2].split(",")[0] for line in comparison.differences] == [
        "sequence_length is 128", "perplexity on wikitext2 was not measured", "not all of piqa",
        "tasks with 5 examples", "only 7 questions of each task"]  # fmt: skip


def test_another_model_has_no_figures_of_the_paper(lab: Lab) -> None:
    assert comparisons(report_runs([summary(lab, lab.run())])) == []


def test_runs_that_differ_in_their_ratio_are_one_curve(lab: Lab) -> None:
    def one(removed: int) -> RunSummary:
        record = lab.run(f"{removed}", roles="bs")
        text = {"text": "wikitext2", "num_tokens": 9, "perplexity": 6.0 + removed}
        export = {"format": "stock", "num_blocks_removed": removed, "num_parameters": 1000 - 100 * removed, "bytes": 1,
                  "verified": True}  # fmt: skip
        record.stages.append(lab.artifact("export", export, f"x{removed}"))
        record.stages.append(lab.artifact("evaluate:pruned", {"texts": [text]}, f"p{removed}"))
        settings = {"num_parameters": 1000, "strategy": "blockpruner", "model_fingerprint": "f"}
        return summary(lab, record.model_copy(update=settings))

    runs = report_runs([one(2), one(1)])
    (picture,) = held_out_curves(runs, [])
    (curve,) = picture.draw(LIGHT)["data"]
    assert curve["x"] == pytest.approx([0.0, 0.15, 0.3])  # as the search has it
    assert curve["y"] == [5.47, 7.0, 8.0]
    found = search_curves(runs)
    assert found is not None
    assert [trace["name"] for trace in found.draw(LIGHT)["data"]] == ["2", "1"]


def test_what_stays_as_zeros_was_removed(lab: Lab) -> None:
    record = lab.run(roles="bs").model_copy(update={"num_parameters": 1000})
    export = {"format": "zeroed", "num_blocks_removed": 1, "num_parameters": 1000, "bytes": 1, "verified": True}
    record.stages.append(lab.artifact("export", export, "zeroed"))
    page = Report.of([summary(lab, record)]).page
    assert ("Parameters removed", "15.0%") in [(card.name, card.value) for card in page.cards]


def test_accuracy_is_acc_norm_where_there_is_one() -> None:
    rows = [
        EvaluationRow("r", "dense", "a", "acc", 0.1, 0.5, 0, 1),
        EvaluationRow("r", "dense", "a", "acc_norm", 0.4, 0.03, 0, 1),
        EvaluationRow("r", "dense", "b", "acc", 0.6, 0.04, 0, 1),
        EvaluationRow("r", "dense", "c", "word_perplexity", 30.0, None, 0, 1),
        EvaluationRow("r", "dense", "d", "acc", float("nan"), None, 0, 1),
    ]
    found = accuracies(rows)
    assert [(each.task, each.metric) for each in found] == [("a", "acc_norm"), ("b", "acc"), ("average", "")]
    assert (found[-1].value, found[-1].stderr) == pytest.approx((0.5, 0.025))  # sqrt(0.03^2 + 0.04^2) / 2


def test_the_average_that_was_stored_counts() -> None:
    rows = [
        EvaluationRow("r", "dense", "a", "acc,some-filter", 0.4, 0.03, 0, 1),
        EvaluationRow("r", "dense", "b", "acc", 0.6, 0.04, 0, 1),
        EvaluationRow("r", "dense", "average", "acc_norm or acc", 0.55, 0.02, 0, 1),  # b has tasks below it
    ]
    assert [(each.task, each.value) for each in accuracies(rows)] == [("a", 0.4), ("b", 0.6), ("average", 0.55)]
    assert [each.task for each in accuracies(rows[1:])] == ["b"]  # of one task there is none


def test_labels_are_no_markup() -> None:
    assert plain("<a href='x'>y</a>\x1b[0m") == "&lt;a href='x'&gt;y&lt;/a&gt;\\x1b[0m"
    assert plain("x" * 100) == "x" * 16 + "…" + "x" * 16


@pytest.mark.parametrize(
    ("roles", "command"),
    [
        ("bsxdp", "blockpruner run recipe.yaml"),
        ("sx", "blockpruner search recipe.yaml && blockpruner export latest"),
        ("s", "blockpruner search recipe.yaml"),
        ("b", "blockpruner baseline recipe.yaml"),
        ("", "blockpruner run recipe.yaml"),
    ],
)
def test_the_command_is_the_one_that_made_the_run(lab: Lab, roles: str, command: str) -> None:
    assert commands(lab.run(roles=roles)) == command


def test_the_command_of_a_model_that_was_only_measured(lab: Lab) -> None:
    record = lab.run(roles="d")
    record.config = {"model": "a b", "tasks": ["x", "y"], "eval_text": ["t.txt", "u.txt"], "limit": None}
    assert commands(record) == "blockpruner evaluate --model 'a b' --tasks x,y --eval-text t.txt --eval-text u.txt"
    record.config = {"model": "m", "tasks": ["x"], "task_data": "d", "log_samples": True, "dtype": "bfloat16"}
    assert commands(record) == "blockpruner evaluate --model m --tasks x --task-data d --log-samples --dtype bfloat16"
    record.config = {"model": "m", "sequence_length": 128, "device": "cpu", "name": "it's"}
    assert commands(record) == "blockpruner evaluate --model m --sequence-length 128 --device cpu --name 'it'\"'\"'s'"
    record.config = {"model": "m", "log_samples": False, "dtype": "auto", "sequence_length": 2048}
    assert commands(record) == "blockpruner evaluate --model m"


def test_what_goes_on_from_a_run_is_told_again_to_trust_its_models_code(lab: Lab) -> None:
    timed, exported, measured = (lab.run(roles=roles) for roles in ("sx", "sx", "d"))
    timed.stages.append(lab.artifact("speed", SPEED, "speed"))
    timed.config |= {"trust_remote_code": True}
    exported.config |= {"trust_remote_code": True}
    measured.config = {"model": "m", "trust_remote_code": True}
    assert commands(timed) == "blockpruner search recipe.yaml && blockpruner speed latest --trust-remote-code"
    assert commands(exported) == "blockpruner search recipe.yaml && blockpruner export latest", "which runs none of it"
    assert commands(measured) == "blockpruner evaluate --model m --trust-remote-code"


# --- for the terminal, for papers, for Prefect ------------------------------------------------------------------------


def test_a_sparkline_is_logarithmic_and_shows_what_is_not_finite() -> None:
    assert sparkline([1.0, 10.0, 10**3.5, 10**7.0]) == "▁▂▅█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([float("inf"), 3.0, float("nan"), 4.0]) == "∞▁?█"
    assert sparkline([]) == ""


def test_the_results_are_one_table(lab: Lab) -> None:
    record = of_the_paper(lab, num_blocks_total=4, num_blocks_removed=2)
    table = results_table(summary(lab, record))
    assert table.columns == ("measured", "dense", "pruned", "dense standard error", "pruned standard error")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["blocks"] == (4, 2, None, None)
    assert rows["parameters"] == (1000, 700, None, None)
    assert rows["perplexity on wikitext2"] == (5.47, 11.0, None, None)
    assert rows["piqa, acc"] == pytest.approx((0.78, 0.6, 0.01, 0.01))
    assert rows["piqa, acc_norm"] == (None, 0.7, None, 0.01)
    assert results_table(summary(lab, lab.run(roles="b"))).columns == ("measured", "dense", "pruned")


def test_vector_pictures_show_the_steps(lab: Lab) -> None:
    found = summary(lab, lab.run())
    strip, curve = blocks_svg(found), perplexity_svg(found)
    assert strip is not None
    assert curve is not None
    texts = [element.text for element in ElementTree.fromstring(strip).iter() if element.tag.endswith("text")]
    assert texts == ["0", "MHA", "1", "MLP", "2"]
    circles = [each for each in ElementTree.fromstring(curve).iter() if each.tag.endswith("circle")]
    assert [float(circle.attrib["cy"]) for circle in circles] == sorted(
        (float(circle.attrib["cy"]) for circle in circles), reverse=True
    )  # 5, 6, 7: up the page
    assert data_uri(strip).startswith("data:image/svg+xml;base64,")
    nothing = summary(lab, lab.run("nothing", roles="b"))
    assert (blocks_svg(nothing), perplexity_svg(nothing)) == (None, None)


# --- models that were pruned elsewhere, and draws ---------------------------------------------------------------------


def of_an_external(lab: Lab) -> RunRecord:
    record = lab.run("c: SliceGPT", roles="b")
    text = {"text": "wikitext2", "num_tokens": 900, "perplexity": 25.0}
    record.stages.append(lab.artifact("evaluate:pruned", {"texts": [text], "metrics": []}, "external"))
    config = make_recipe({"model": "m", "calibration": "notes.txt", "ratio": 0.2, "eval_text": "w.txt"}).model_dump()
    about = {"model": "m", "strategy": "SliceGPT", "external": "/x/sliced model", "num_parameters": 1000,
             "num_parameters_left": 750, "comparison": "c", "config": config}  # fmt: skip
    return record.model_copy(update=about)


def test_a_model_that_was_pruned_elsewhere_has_its_ratio(lab: Lab) -> None:
    (run,) = runs = report_runs([summary(lab, of_an_external(lab))])
    assert run.summary.ratio == 0.25
    (picture,) = held_out_curves(runs, [])
    (curve,) = picture.draw(LIGHT)["data"]
    assert (curve["x"], curve["y"]) == ([0.0, 0.25], [5.47, 25.0])


def test_a_model_that_was_pruned_elsewhere_is_measured_again_by_compare(lab: Lab, tmp_path: Path) -> None:
    record = of_an_external(lab)
    assert commands(record) == "blockpruner compare recipe.yaml"
    (tmp_path / "recipe.yaml").write_text(recipe_text(record))
    again = load_comparison(str(tmp_path / "recipe.yaml"), {}, {})
    (cell,) = again.cells
    assert again.name == "c"
    assert cell.external == External(path="/x/sliced model", label="SliceGPT")
    assert (cell.recipe.name, cell.recipe.eval_text, cell.recipe.ratio) == (record.name, ("w.txt",), None)
    facts = dict(Report.of([summary(lab, record)]).page.details[0].facts)
    assert facts["Pruned elsewhere"] == "SliceGPT: /x/sliced model"
    assert "Search" not in facts


def test_draws_are_not_joined(lab: Lab) -> None:
    runs = []
    for seed, removed, perplexity in ((0, 1, 8.0), (1, 1, 30.0), (0, 2, 9.0), (2, 2, 7.0)):
        record = lab.run(f"c: draw {seed} {removed}", roles="bs")
        export = {"format": "stock", "num_blocks_removed": removed, "num_parameters": 1000 - 150 * removed, "bytes": 1,
                  "verified": True}  # fmt: skip
        text = {"text": "wikitext2", "num_tokens": 9, "perplexity": perplexity}
        record.stages.append(lab.artifact("export", export, f"{seed} {removed}"))
        record.stages.append(lab.artifact("evaluate:pruned", {"texts": [text]}, f"{seed} {removed}"))
        about = {"num_parameters": 1000, "strategy": "random", "metric": "chance", "block_kinds": "both", "model": "m",
                 "config": {"strategy_seed": seed}, "comparison": "c"}  # fmt: skip
        runs.append(summary(lab, record.model_copy(update=about)))
    (picture,) = held_out_curves(report_runs(runs), [])
    curves = {curve["name"]: curve["y"] for curve in picture.draw(LIGHT)["data"]}
    assert curves == {"random, draw 0": [5.47, 8.0, 9.0], "draw 1 1": [5.47, 30.0], "draw 2 2": [5.47, 7.0]}


def test_the_rows_of_one_comparison_are_called_as_it_calls_them(lab: Lab) -> None:
    rows = [lab.run(f"c: {name}").model_copy(update={"comparison": "c"}) for name in ("rm", "oneshot")]
    assert [run.label for run in report_runs([summary(lab, row) for row in rows])] == ["rm", "oneshot"]
    with_another = [*rows, lab.run("d: rm").model_copy(update={"comparison": "d"})]
    named = [run.label for run in report_runs([summary(lab, row) for row in with_another])]
    assert named == ["c: rm", "c: oneshot", "d: rm"]


# --- names and legends ------------------------------------------------------------------------------------------------


LONG_NAMES = [f"mmlu_flan_n_shot_generative_{place}_computer_science" for place in ("college", "high_school")]


def with_tasks(lab: Lab, name: str, *tasks: str) -> RunRecord:
    record = lab.run(name, roles="bsx")
    metrics = [{"task": task, "metric": "acc", "value": 0.1 + place / 10} for place, task in enumerate(tasks)]
    record.stages.append(lab.artifact("evaluate:pruned", {"texts": [], "metrics": metrics}, name + "".join(tasks)))
    return record


def test_two_long_names_are_two_bars(lab: Lab) -> None:
    picture = task_bars(report_runs([summary(lab, with_tasks(lab, "a", *LONG_NAMES, "piqa"))]))
    assert picture is not None
    figure = picture.draw(LIGHT)
    (trace,) = figure["data"]
    assert [label.replace("<br>", "") for label in trace["y"]] == [*LONG_NAMES, "piqa", "average"]
    assert max(len(line) for label in trace["y"] for line in label.split("<br>")) <= 34
    assert figure["layout"]["yaxis"]["categoryarray"] == trace["y"]


def test_of_a_single_task_every_model_has_a_line_with_its_name(lab: Lab) -> None:
    runs = report_runs([summary(lab, with_tasks(lab, name, "piqa")) for name in ("one", "other")])
    picture = task_bars(runs)
    assert picture is not None
    figure = picture.draw(LIGHT)
    assert [(trace["y"], trace["x"]) for trace in figure["data"]] == [(["one"], [0.1]), (["other"], [0.1])]
    assert figure["layout"]["yaxis"]["categoryarray"] == ["one", "other"]
    assert not figure["layout"]["showlegend"]


def test_a_legend_takes_no_room_from_its_picture(lab: Lab) -> None:
    def heights(number: int) -> tuple[int, int]:
        runs = [summary(lab, lab.run(f"a run of some length, number {i}", roles="s")) for i in range(number)]
        found = search_curves(report_runs(runs))
        assert found is not None
        layout = found.draw(LIGHT)["layout"]
        return layout["height"], layout["meta"]["narrowHeight"]

    (one, one_narrow), (many, many_narrow) = heights(1), heights(12)
    assert one == one_narrow
    assert many - one >= 4 * 19  # three or fewer beside each other
    assert many_narrow - one_narrow >= 12 * 19  # one below the other


def test_no_two_runs_have_the_same_sign(lab: Lab) -> None:
    runs = report_runs([summary(lab, lab.run(f"{number}", roles="s")) for number in range(24)])
    found = search_curves(runs)
    assert found is not None
    signs = {
        (trace["line"]["color"], trace["line"]["dash"], trace["marker"]["symbol"])
        for trace in found.draw(LIGHT)["data"]
    }
    assert len(signs) == 24
    assert len({(color, symbol) for color, _, symbol in signs}) == 24


def test_the_overview_has_a_line_for_the_dense_model_and_no_column_that_says_nothing(lab: Lab) -> None:
    runs = [lab.run("night", roles="bsxdp"), with_tasks(lab, "other tasks", "arc", "piqa")]
    runs = [record.model_copy(update={"strategy": "rm", "num_parameters": 1000}) for record in runs]
    table = Report.of([summary(lab, record) for record in runs]).page.sections[0].table
    assert table is not None
    assert table.columns == ("run", "strategy", "blocks", "parameters removed", "perplexity on calibration",
                             "perplexity on wikitext2", "accuracy, piqa", "accuracy, arc, piqa")  # fmt: skip
    assert table.rows[0] == ("dense", None, 0, 0.0, 5.0, 5.47, 0.78, None)
    assert table.rows[2] == ("other tasks", "rm", None, pytest.approx(0.3), 7.0, None, None, pytest.approx(0.15))
