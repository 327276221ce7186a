"""The paper's published figures as data: they add up as the paper's own text says, and only its models find them."""

from __future__ import annotations

import pytest

from flows.paper_figures import paper_figures

FIGURES = paper_figures()


def test_all_six_models_are_there_with_every_published_kind_of_row() -> None:
    assert [model.name for model in FIGURES.models] == [
        *("Llama2-7B", "Llama2-13B", "Baichuan2-7B", "Baichuan2-13B", "Qwen1.5-7B", "Qwen1.5-14B")
    ]
    for model in FIGURES.models:
        assert {"blockpruner", "shortgpt", "laco", "rm", "oneshot", "layers"} <= {row.strategy for row in model.results}
        assert model.dense.perplexity is not None
        assert model.dense.average is not None
        assert all(row.average is not None and row.average < model.dense.average for row in model.results)
    # SliceGPT was measured on the Llamas only.
    assert [model.name for model in FIGURES.models if model.results_of("slicegpt")] == ["Llama2-7B", "Llama2-13B"]


@pytest.mark.parametrize("model", FIGURES.models, ids=lambda model: model.name)
def test_greedy_search_wins_on_every_model_of_the_table(model: object) -> None:
    """What the paper concludes from its Table 1; a slip of a digit would show."""
    found = {row.strategy: row.perplexity for row in reversed(model.results) if row.perplexity}  # type: ignore[attr-defined]
    assert min(found, key=found.__getitem__) == "blockpruner"


@pytest.mark.parametrize(
    ("typed", "num_layers", "name"),
    [
        ("meta-llama/Llama-2-7b-hf", 32, "Llama2-7B"),
        ("/models/llama-2-7B-hf/", None, "Llama2-7B"),
        ("Qwen/Qwen1.5-14B", 40, "Qwen1.5-14B"),
        ("meta-llama/Llama-2-7b-hf", 4, None),  # another model of that name
        ("Qwen/Qwen1.5-14B-Chat", None, None),
        ("", None, None),
        (None, None, None),
    ],
)
def test_a_model_is_known_by_hub_id_or_folder(typed: str | None, num_layers: int | None, name: str | None) -> None:
    found = FIGURES.model(typed, num_layers)
    assert (found.name if found else None) == name


@pytest.mark.parametrize(
    ("strategy", "ratio", "average"),
    [
        ("blockpruner", 0.2203, 60.17),
        ("blockpruner", 0.24, 60.17),  # between two of the paper's, and nearer to the first
        ("blockpruner", 0.28, 55.02),
        ("blockpruner", 0.3013, 55.02),
        ("blockpruner", 0.37, 49.36),
        ("blockpruner", 0.44, 46.95),
        ("blockpruner", 0.1, None),
        ("blockpruner", 0.48, None),
        ("shortgpt", 0.21, 58.18),  # of an unstated ratio: about BlockPruner's
        ("shortgpt", 0.3, None),
        ("random", 0.22, None),
    ],
)
def test_a_ratio_finds_the_row_nearest_to_it(strategy: str, ratio: float, average: float | None) -> None:
    found = FIGURES.models[0].nearest(strategy, ratio)
    assert (found.average if found else None) == average
