"""Block Influence and relative magnitude against the papers' formulas, written out number by number."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockpruner.scoring.build import build_scorer
from blockpruner.scoring.layer_measures import LayerMeasure, block_influence, relative_magnitude
from blockpruner.scoring.metrics import metric_of
from blockpruner.scoring.settings import ScorerName, ScorerSettings
from tests.scorers import row_of
from tests.tiny_models import tiny_model, tiny_token_ids

TOKENS = tiny_token_ids(5, 9, seed=3)


def by_hand_bi(x: list[float], y: list[float]) -> float:
    """ShortGPT: 1 - x . y / (|x| |y|) for one token."""
    dot = math.fsum(a * b for a, b in zip(x, y, strict=True))
    return 1 - dot / (math.hypot(*x) * math.hypot(*y))


def by_hand_rm(x: list[float], y: list[float]) -> float:
    """|f(x)| / |x + f(x)| for one token, with y = x + f(x)."""
    return math.hypot(*(b - a for a, b in zip(x, y, strict=True))) / math.hypot(*y)


FORMULAS = [(block_influence, by_hand_bi), (relative_magnitude, by_hand_rm)]


def test_vectors_whose_measures_are_known() -> None:
    x = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    assert block_influence(x, 7 * x).item() == pytest.approx(0, abs=1e-6)
    assert block_influence(x, -x).item() == pytest.approx(2)
    turned = torch.tensor([[[-4.0, 3.0], [5.0, 0.0]]])  # a right angle, and none
    assert block_influence(x, turned).item() == pytest.approx(0.5)
    assert relative_magnitude(x, x).item() == 0
    assert relative_magnitude(x, 2 * x).item() == pytest.approx(0.5)
    y = torch.tensor([[[3.0, 8.0], [0.0, 1.0]]])
    assert relative_magnitude(x, y).item() == pytest.approx((4 / math.sqrt(73) + math.sqrt(2)) / 2)


def ins_and_outs(family: str) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """A model, and what each of its layers gets and gives."""
    model = tiny_model(family)
    seen: list[tuple[Tensor, Tensor]] = []

    def listen(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append((args[0], output[0] if isinstance(output, tuple) else output))

    hooks = [layer.register_forward_hook(listen) for layer in row_of(model).decoder_layers(model)]
    with torch.inference_mode():
        model(input_ids=TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return model, seen


@pytest.mark.parametrize("scorer", ["sweep", "plain"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "cohere", "gemma2", "qwen3_moe", "opt"])
@pytest.mark.parametrize(("measure", "by_hand"), FORMULAS)
def test_every_layers_measure_is_the_mean_over_its_tokens(
    family: str, scorer: ScorerName, measure: LayerMeasure, by_hand: Any
) -> None:
    model, seen = ins_and_outs(family)
    settings = ScorerSettings(scorer=scorer)
    built = build_scorer(row_of(model), model, TOKENS, "cpu", metric_of("perplexity"), settings, 2, whole_layers=True)
    values_LB = built.measure_layers(measure)
    assert values_LB.shape == (4, 5)
    for layer, (entered, left) in enumerate(seen):
        for row in range(5):
            pairs = zip(entered[row].tolist(), left[row].tolist(), strict=True)
            expected = math.fsum(by_hand(x, y) for x, y in pairs) / 9
            assert values_LB[layer, row].item() == pytest.approx(expected, rel=1e-4, abs=1e-6), (layer, row)
