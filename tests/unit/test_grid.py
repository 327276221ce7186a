"""Comparisons: what a grid means, what is refused and in which words, and that the project's own are valid."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from blockpruner.errors import ConfigurationError
from blockpruner.strategies import STRATEGIES
from flows.completion import complete_comparison
from flows.grid import Comparison, External, comparison_names, in_families, load_comparison, make_comparison
from flows.paper_figures import paper_figures
from flows.recipe import load_recipe

BASE = {"model": "m", "ratio": 0.2}


def comparison(**fields: Any) -> Comparison:
    return make_comparison({"name": "c", "base": BASE, **fields})


def test_a_block_gives_every_combination_the_last_axis_fastest() -> None:
    cells = comparison(grid={"metric": ["perplexity", "js"], "seed": [1, 2], "num_samples": 8}).cells
    found = [(cell.recipe.metric, cell.recipe.seed, cell.recipe.num_samples, cell.recipe.ratio) for cell in cells]
    assert found == [
        ("perplexity", 1, 8, 0.2),
        ("perplexity", 2, 8, 0.2),
        ("js", 1, 8, 0.2),
        ("js", 2, 8, 0.2),
    ]


def test_blocks_are_added_up_and_what_is_the_same_counts_once() -> None:
    blocks = [{"ratio": [0.1, 0.2]}, {"ratio": [0.2, 0.3]}, {"num_blocks": 4}]
    cells = comparison(grid=blocks).cells
    assert [(cell.recipe.ratio, cell.recipe.num_blocks) for cell in cells] == [
        (0.1, None),
        (0.2, None),
        (0.3, None),
        (None, 4),
    ]


def test_labels_name_what_differs_among_a_strategys_own_cells() -> None:
    blocks = [
        {"strategy": ["oneshot", "rm"]},
        {"strategy": "random", "strategy_seed": [0, 1]},
        {"ratio": [0.1, 0.3]},
    ]
    cells = comparison(grid=blocks).cells
    assert [cell.label for cell in cells] == [
        *("oneshot", "rm", "random strategy_seed=0", "random strategy_seed=1"),
        *("blockpruner ratio=0.1", "blockpruner ratio=0.3"),
    ]
    assert cells[0].recipe.name == "c: oneshot"


def test_labels_name_what_is_unusual_where_strategies_differ() -> None:
    blocks = [
        {"strategy": "oneshot", "metric": "js", "calibration": ["c4", "ptb"]},
        {"calibration": "c4"},
        {"strategy": "random", "strategy_seed": 3},
    ]
    cells = comparison(grid=blocks).cells
    assert [cell.label for cell in cells] == [
        *("oneshot js c4", "oneshot js ptb", "blockpruner c4"),
        "random strategy_seed=3",
    ]


def test_a_large_grid_is_labelled_at_once() -> None:
    started = time.monotonic()
    cells = comparison(grid={"seed": list(range(50)), "num_samples": list(range(1, 41)), "metric": ["kl", "js"]}).cells
    assert len({cell.label for cell in cells}) == 4000
    assert time.monotonic() - started < 20  # half a second; more than a minute, were each compared with all others


def test_what_a_strategy_does_not_heed_makes_no_cells() -> None:
    blocks = [
        {"strategy": ["blockpruner", "random", "rm"], "strategy_seed": [0, 1, 2]},
        {"strategy": ["shortgpt", "laco"], "laco_interval": 1, "stock_compatible": [False, True]},
        {"strategy": "shortgpt"},
    ]
    cells = comparison(grid=blocks).cells
    assert [cell.label for cell in cells] == [
        *("blockpruner", "random strategy_seed=0", "random strategy_seed=1", "random strategy_seed=2"),
        *("rm", "shortgpt", "laco"),
    ]
    assert cells[-1].recipe.laco_interval == 1
    drawn_anew = comparison(grid={"strategy": ["blockpruner", "random", "rm"], "seed": [0, 1]})
    assert len(drawn_anew.cells) == 6  # other rows of the calibration set, for whatever strategy


def test_paths_are_labelled_by_what_tells_them_apart() -> None:
    models = ["/data/a/model", "/data/b/model", "org/Llama", "model", "./org/Llama"]
    cells = comparison(grid={"model": models}).cells
    assert [cell.label for cell in cells] == ["a/model", "b/model", "org/Llama", "model", "./org/Llama"]
    texts = ["/one/notes.txt", "/two/notes.txt", "alpaca"]
    assert [cell.label for cell in comparison(grid={"calibration": texts}).cells] == [
        *("one/notes.txt", "two/notes.txt", "alpaca")
    ]


def test_cells_that_differ_in_how_far_they_prune_share_a_family_the_furthest_first() -> None:
    cells = comparison(grid={"metric": ["perplexity", "js"], "ratio": [0.1, 0.3, 0.2]}).cells
    families = in_families(cells)
    assert [[(cell.recipe.metric, cell.recipe.ratio) for cell in family] for family in families] == [
        [("perplexity", 0.3), ("perplexity", 0.2), ("perplexity", 0.1)],
        [("js", 0.3), ("js", 0.2), ("js", 0.1)],
    ]
    assert len({cell.key for cell in cells}) == 6


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"grid": {"strategie": ["rm"]}}, "unknown axis 'strategie' of the grid; did you mean 'strategy'?"),
        ({"grid": {"strategy": ["rmm"]}}, "unknown strategy 'rmm'"),
        ({"grid": {"ratio": [0.1, 2]}}, "ratio is 2"),
        ({"grid": {"ratio": []}}, "the axis ratio of the grid has no values"),
        ({"grid": {"device": ["cpu", "cuda"]}}, "device is no axis of a grid"),
        ({"grid": {"tasks": "piqa"}}, "all cells are measured alike"),
        ({"grid": {"sequence_length": [8, 16]}}, "all cells are measured alike"),
        ({"grid": {"dtype": "bfloat16"}}, "all cells are measured alike"),
        ({"grid": {"name": "x"}}, "runs are named after their cells"),
        ({"grid": {"ratio": 0.1, "num_blocks": 3}}, "both num_blocks and ratio are given"),
        ({"grid": {"metric": "js", "strategy": "rm"}}, "metric"),
        ({"grid": {"seed": list(range(200)), "num_samples": list(range(1, 200))}}, "more than 10,000 cells"),
        ({"grid": []}, "there is nothing to compare"),
        ({}, "no grid is given"),
        ({"grid": 3}, "grid of the comparison"),
        ({"gird": {}, "grid": {}}, "unknown field 'gird' of a comparison; did you mean 'grid'?"),
        ({"grid": {}, "external": [{"path": "x", "lable": "y"}]}, "unknown field 'external.0.lable'"),
        ({"grid": {}, "external": [{"path": "x", "label": "y"}] * 2}, "two external checkpoints are labelled 'y'"),
        (
            {"grid": {"ratio": [0.1, 0.2]}, "external": [{"path": "x", "label": "ratio=0.1"}]},
            "labelled 'ratio=0.1', as an",
        ),
        (
            {"grid": {"strategy": ["rm", "laco"]}, "external": [{"path": "x", "label": "rm"}]},
            "labelled 'rm', as another",
        ),
        ({"grid": {}, "external": [{"path": "x", "label": "dense"}]}, "labelled 'dense', as another row"),
        ({"grid": {"model": ["a", "b"]}, "external": [{"path": "x", "label": "y"}]}, "which model y was made from"),
        ({"base": {"model": "m"}, "grid": {"metric": ["js"]}}, "how far to prune is not said"),
        ({"base": {"modle": "m"}, "grid": {"ratio": 0.1}}, "unknown recipe field 'modle'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        comparison(**fields)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_external_checkpoint_has_the_recipe_of_the_model_that_it_was_made_from() -> None:
    external = [{"path": "x", "label": "SliceGPT", "model": "b"}]
    cell = comparison(grid={"model": ["a", "b"]}, external=external).cells[-1]
    assert (cell.label, cell.recipe.model, cell.recipe.name) == ("SliceGPT", "b", "c: SliceGPT")
    assert cell.external is not None
    assert cell.external.path == "x"


def test_an_external_checkpoint_alone_is_a_comparison() -> None:
    (cell,) = comparison(external=[{"path": "x", "label": "y"}]).cells
    assert cell.recipe.model == "m"


def test_a_file_and_its_overrides(tmp_path: Path) -> None:
    (tmp_path / "text.txt").touch()
    file = tmp_path / "mine.yaml"
    file.write_text("base: {model: m, calibration: text.txt, num_blocks: 3}\ngrid: {calibration: [text.txt, alpaca]}\n")
    (tmp_path / "x").mkdir()
    file.write_text(file.read_text() + "external: [{path: x, label: beside}, {path: org/x, label: hub}]\n")
    found = load_comparison(str(file), {"ratio": 0.1, "limit": 5}, {"external": [{"path": "x", "label": "y"}]})
    first, second, beside, hub, external = found.cells
    paths = [cell.external.path for cell in (beside, hub, external) if cell.external]
    assert paths == [str(tmp_path / "x"), "org/x", "x"]  # on the command line a path is of the current folder
    assert found.name == "mine"
    assert (first.recipe.ratio, first.recipe.num_blocks, first.recipe.limit) == (0.1, None, 5)
    assert [first.recipe.calibration, second.recipe.calibration] == [str(tmp_path / "text.txt"), "alpaca"]
    assert external.label == "y"
    with pytest.raises(ConfigurationError, match="calibration differs from cell to cell"):
        load_comparison(str(file), {"calibration": "c4"}, {})


def test_no_such_comparison() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'ratios'"):
        load_comparison("ratio", {}, {})


def test_a_comparison_is_no_recipe_of_a_run() -> None:
    with pytest.raises(ConfigurationError, match="give `blockpruner compare ratios`"):
        load_recipe("ratios", {})


# --- the project's own ------------------------------------------------------------------------------------------------

PAPERS = {
    "paper-llama2-7b": "Llama2-7B",
    "paper-llama2-13b": "Llama2-13B",
    "paper-qwen1.5-7b": "Qwen1.5-7B",
    "paper-qwen1.5-14b": "Qwen1.5-14B",
    "paper-baichuan2-7b": "Baichuan2-7B",
}
OTHERS = ["ablation-calibration", "ablation-kinds", "demo-compare", "ratios"]


def test_the_projects_comparisons() -> None:
    assert comparison_names() == sorted([*PAPERS, *OTHERS])
    assert complete_comparison("ablation") == ["ablation-calibration", "ablation-kinds"]


@pytest.mark.parametrize("name", [*PAPERS, *OTHERS])
def test_every_one_is_valid(name: str) -> None:
    found = load_comparison(name, {}, {})
    assert found.name == name
    assert found.description
    labels = [cell.label for cell in found.cells]
    assert len(set(labels)) == len(labels) > 1
    for cell in found.cells:
        cell.recipe.require_target()
        assert cell.recipe.eval_text


@pytest.mark.parametrize("name", [name for name in [*PAPERS, *OTHERS] if name != "demo-compare"])
def test_they_measure_as_the_paper_does(name: str) -> None:
    figures = paper_figures()
    for cell in load_comparison(name, {}, {}).cells:
        recipe = cell.recipe
        assert (recipe.sequence_length, recipe.eval_text) == (figures.sequence_length, (figures.text,))
        assert set(recipe.tasks) == set(figures.tasks)
        assert recipe.num_fewshot is None
        assert recipe.limit is None


@pytest.mark.parametrize(("name", "model"), PAPERS.items())
def test_the_papers_tables_have_its_model_setting_and_strategies(name: str, model: str) -> None:
    cells = load_comparison(name, {}, {}).cells
    assert {cell.recipe.strategy for cell in cells} == set(STRATEGIES)
    for cell in cells:
        recipe = cell.recipe
        found = paper_figures().model(recipe.model)
        assert found is not None
        assert found.name == model
        assert (recipe.calibration, recipe.num_samples, recipe.seed) == ("alpaca", 256, 42)
    counts = {"paper-llama2-7b": 17, "paper-llama2-13b": 24}
    assert [cell.recipe.num_blocks for cell in cells if cell.recipe.strategy == "blockpruner"] == [counts.get(name)]


def test_the_demo_has_every_strategy_at_one_ratio() -> None:
    cells = load_comparison("demo-compare", {}, {}).cells
    assert {cell.recipe.strategy for cell in cells} == set(STRATEGIES)
    assert len({cell.recipe.ratio for cell in cells}) == 1
    assert all(Path(cell.recipe.model, "config.json").is_file() for cell in cells)


def test_a_checkpoint_pruned_elsewhere_is_the_same_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sliced").mkdir()
    monkeypatch.chdir(tmp_path)
    assert External(path="sliced", label="s").anchored().path == str(tmp_path / "sliced")
    assert External(path="owner/of-the-hub", label="s").anchored().path == "owner/of-the-hub"
