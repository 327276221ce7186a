"""The paper's figures beside our rows: where they may stand, which of them, and what is said where they may not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from rich.console import Console

from flows.comparison import Pair, Row, _beside_the_papers
from flows.comparison_table import comparison_text, comparison_view, full_table, people_table
from flows.grid import Comparison, make_comparison
from flows.paper_figures import paper_figures
from tests.unit.test_comparison_table import GREEDY

FIVE = list(paper_figures().tasks)
PAPERS: dict[str, Any] = {
    "model": "meta-llama/Llama-2-7b-hf",
    "calibration": "alpaca",
    "num_blocks": 17,
    "tasks": FIVE,
    "eval_text": "wikitext2",
}


def compared(*blocks: dict[str, Any], external: str | None = None, **base: Any) -> Comparison:
    more = {"external": [{"path": "x", "label": external}]} if external else {}
    return make_comparison({"name": "c", "base": {**PAPERS, **base}, "grid": list(blocks or [{}]), **more})


def rows(comparison: Comparison, **changed: Any) -> list[Row]:
    """Rows of a comparison's cells, as if each had been measured like `GREEDY`."""
    found = []
    for cell in comparison.cells:
        known = {"label": cell.label, "strategy": cell.external.label if cell.external else cell.recipe.strategy}
        measured = {"model": cell.recipe.model, "published": None, **known, **changed}
        found.append(_beside_the_papers(dataclasses.replace(GREEDY, **measured), cell, None))
    return found


@pytest.mark.parametrize(
    ("comparison", "row", "perplexity", "average"),
    [
        (compared(), {}, 11.51, 60.17),
        (compared(), {"ratio": 0.2499}, 11.51, 60.17),
        (compared(strategy="shortgpt"), {}, 18.45, 58.18),
        (compared(strategy="oneshot"), {}, None, 55.89),
        (compared(tasks="piqa"), {}, 11.51, None),
        (compared(limit=10), {}, 11.51, None),
        (compared(num_fewshot=5), {}, 11.51, None),
        (compared(num_fewshot=0), {}, 11.51, 60.17),
        (compared(), {"perplexities": {"c4": Pair(1.0, 2.0)}}, None, 60.17),
        (compared(num_blocks=None, ratio=0.3), {"ratio": 0.301}, None, 55.02),
        (compared(num_blocks=None, ratio=0.37), {"ratio": 0.3712}, None, 49.36),
        (compared(num_blocks=None, ratio=0.43), {"ratio": 0.431}, None, 46.95),
    ],
)
def test_the_papers_figures_stand_beside_what_was_done_and_measured_alike(
    comparison: Comparison, row: dict[str, Any], perplexity: float | None, average: float | None
) -> None:
    (found,) = rows(comparison, **row)
    assert found.published is not None
    assert found.published.perplexity.pruned == perplexity
    assert found.published.average.pruned == (None if average is None else pytest.approx(average / 100))
    missing = (perplexity is None and "wikitext2" not in found.perplexities) or average is None
    assert bool(found.not_as_in_paper) == missing


@pytest.mark.parametrize(
    ("comparison", "said"),
    [
        (compared(calibration="wikitext2"), "calibration is wikitext2, in the paper alpaca"),
        (compared(num_samples="all"), "num_samples is all, in the paper 256"),
        (compared(seed=1), "seed is 1, in the paper 42"),
        (compared(sequence_length=1024), "sequence_length is 1024, in the paper 2048"),
        (compared(stock_compatible=True), "stock_compatible is True, in the paper False"),
        (compared(metric="js"), "metric is js, in the paper perplexity"),
        (compared(block_kinds="mha"), "block_kinds is mha, in the paper both"),
        (compared(strategy="oneshot", metric="kl", block_kinds="mha"), "metric is kl, in the paper perplexity"),
        (compared(strategy="layers", metric="js"), "metric is js, in the paper perplexity"),
    ],
)
def test_a_search_that_is_not_the_papers_has_none_of_its_figures_and_says_why(
    comparison: Comparison, said: str
) -> None:
    (found,) = rows(comparison)
    assert found.published is None
    assert found.not_as_in_paper[0] == said


def test_nothing_stands_beside_another_ratio_method_or_model() -> None:
    (far,) = rows(compared(), ratio=0.26)
    assert (far.published, len(far.not_as_in_paper)) == (None, 1)
    (drawn,) = rows(compared(strategy="random"))
    assert (drawn.published, drawn.not_as_in_paper) == (None, ())
    (another,) = rows(compared(model="org/other", limit=3))
    assert (another.published, another.not_as_in_paper) == (None, ())


def test_a_checkpoint_pruned_elsewhere_was_not_searched_for_by_us() -> None:
    """So that only how it was measured counts."""
    found = rows(compared(seed=7, external="SliceGPT"))[-1]
    assert found.published is not None
    assert found.published.perplexity.pruned == 30.74
    shorter = rows(compared(sequence_length=512, external="SliceGPT"))[-1]
    assert shorter.published is not None
    assert (shorter.published.perplexity.pruned, shorter.published.average.pruned) == (None, pytest.approx(0.5783))


def test_every_form_of_the_table_says_what_differs_from_the_paper() -> None:
    comparison = compared({"seed": [42, 1]}, {"strategy": "shortgpt"}, limit=10)
    found = rows(comparison)
    limited, other_seed = "only 10 questions of each task, in the paper all", "seed is 1, in the paper 42"
    console = Console(width=200)
    with console.capture() as capture:
        console.print(comparison_view(comparison, found))
    for text in (
        capture.get(),
        comparison_text(comparison, found, "markdown"),
        comparison_text(comparison, found, "latex"),
    ):
        assert f"left out of every row: {limited}" in text
        assert "blockpruner seed" in text
        assert f"1: {other_seed}" in text
    latex = comparison_text(comparison, found, "latex")
    assert all(line.startswith("%") for line in latex.partition("\\end{tabular}")[2].splitlines() if line)
    by_label = {row["label"]: row["not_as_in_paper"] for row in full_table(found).records}
    assert by_label["blockpruner seed=1"] == f"{other_seed}; {limited}"
    assert f'"not_as_in_paper": ["{other_seed}", "{limited}"]' in comparison_text(comparison, found, "json")


def test_the_papers_ratio_stands_beside_its_figures() -> None:
    table = people_table(rows(compared(), ratio=0.2203))
    at = table.columns.index("paper removed")
    assert [row[at] for row in table.rows] == ["0.00%", "21.99%"]
    assert "paper removed" not in people_table(rows(compared(limit=3, eval_text="c4"), perplexities={})).columns
