"""LaCo against its paper's formulas, written out by hand on a state dict and on models that are really smaller."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from blockpruner.blocks import Block, all_blocks, both_of
from blockpruner.checkpoint import Checkpoint
from blockpruner.collapse import CollapseSearch, MergingModel
from blockpruner.errors import ConfigurationError
from blockpruner.export.write import write_export
from blockpruner.journal import SearchJournal
from blockpruner.merging import MergedLayers, check_mergeable, combinations, stored_dtype
from blockpruner.search import SearchTarget
from blockpruner.strategies import LacoSettings
from blockpruner.trace import LayerMerge, SearchStep
from tests.oracles import oracle_perplexity, oracle_sequence_nll
from tests.scorers import row_of
from tests.tiny_models import TINY_FAMILIES, save_tiny_model, tiny_model, tiny_token_ids

TOKENS = tiny_token_ids(4, 10, seed=2)
LAYERS = 8
MERGED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices of a Llama layer that the authors' code merges."""


def smaller(model: Any, layers: Sequence[Mapping[str, Tensor]]) -> Any:
    """A Llama with these layers' weights, and all else from the original; transformers' own class of fewer layers."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    made = AutoModelForCausalLM.from_config(config).eval()
    rest = {name: tensor for name, tensor in model.state_dict().items() if ".layers." not in name}
    numbered = {f"model.layers.{i}.{name}": tensor for i, layer in enumerate(layers) for name, tensor in layer.items()}
    made.load_state_dict({**rest, **numbered})
    return made


def layer_weights(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    states = model.state_dict()
    return [
        {name.split(".", 3)[3]: states[name].clone() for name in states if name.startswith(f"model.layers.{i}.")}
        for i in range(model.config.num_hidden_layers)
    ]


def rdsc(layers: list[dict[str, Tensor]], at: int, count: int) -> list[dict[str, Tensor]]:
    """theta_l + sum_k (theta_(l+k) - theta_l), and layers l+1 to l+count are gone."""
    merged = dict(layers[at])
    for name, theta in layers[at].items():
        if name.split(".")[-2] in MERGED:
            total = theta.clone()
            for k in range(1, count + 1):
                total = total + (layers[at + k][name] - theta)
            merged[name] = total
    return [*layers[:at], merged, *layers[at + count + 1 :]]


@torch.inference_mode()
def similarity(model: Any, dense: Any) -> float:
    """Cosine of the last hidden states, each sequence's as one vector, mean over sequences."""
    cosines = []
    for row in TOKENS:
        mine = model(input_ids=row[None], output_hidden_states=True).hidden_states[-1].flatten().tolist()
        theirs = dense(input_ids=row[None], output_hidden_states=True).hidden_states[-1].flatten().tolist()
        dot = math.fsum(a * b for a, b in zip(mine, theirs, strict=True))
        cosines.append(dot / (math.hypot(*mine) * math.hypot(*theirs)))
    return sum(cosines) / len(cosines)


@torch.inference_mode()
def perplexity_of(model: Any) -> float:
    return oracle_perplexity(oracle_sequence_nll(model(input_ids=TOKENS).logits, TOKENS))


def algorithm_1(model: Any, settings: LacoSettings) -> list[dict[str, Any]]:
    """The paper's Algorithm 1, on models that are built anew for each attempt."""
    layers, accepted, tried = layer_weights(model), [], []
    names = list(range(LAYERS))
    at = (settings.last_layer or LAYERS) - settings.layers_per_merge
    while at >= settings.first_layer:
        count = min(settings.layers_per_merge - 1, len(layers) - at - 1)
        if count == 0:
            at -= 1
            continue
        attempt = rdsc(layers, at, count)
        made = smaller(model, attempt)
        score = similarity(made, model)
        tried.append((names[at + 1], score))
        if score > settings.threshold:
            accepted.append({"into": names[at], "gone": names[at + 1 : at + 1 + count], "tried": tried})
            accepted[-1] |= {"perplexity": perplexity_of(made), "model": made}
            layers, names, tried = attempt, [*names[: at + 1], *names[at + 1 + count :]], []
            at = min(at - settings.interval, len(layers) - settings.layers_per_merge)
        else:
            at -= 1
    return accepted


def laco(folder: Path, model: PreTrainedModel, settings: LacoSettings) -> CollapseSearch:
    bench = MergingModel(row_of(model), model, TOKENS, torch.float32)
    sizes = dict.fromkeys(all_blocks(LAYERS), 10)
    return CollapseSearch(bench, sizes, 1000, SearchJournal(folder, "5" * 64), settings=settings)


SETTINGS = [
    LacoSettings(layers_per_merge=2, interval=1, threshold=0.85),
    LacoSettings(layers_per_merge=2, interval=1, threshold=0.7),
    LacoSettings(layers_per_merge=3, interval=1, threshold=0.3, last_layer=7),
    LacoSettings(layers_per_merge=3, interval=2, threshold=0.2, first_layer=1),
    LacoSettings(layers_per_merge=4, interval=1, threshold=-0.9),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_merges_similarities_and_perplexities_are_those_of_the_papers_algorithm(
    tmp_path: Path, settings: LacoSettings
) -> None:
    expected = algorithm_1(tiny_model(num_hidden_layers=LAYERS), settings)
    assert expected, "nothing is accepted: the test would say nothing"
    total = sum(2 * len(each["gone"]) for each in expected)
    steps = laco(tmp_path, tiny_model(num_hidden_layers=LAYERS), settings).run(target(total))
    assert len(steps) == len(expected)
    for step, each in zip(steps, expected, strict=True):
        assert step.merge == LayerMerge(layer_index=each["into"], merged=tuple(each["gone"]))
        assert step.blocks == tuple(block for index in each["gone"] for block in both_of(index))
        tried = {mha_index: 1 - score for mha_index, score in each["tried"]}
        assert {c.block.layer_index: c.score for c in step.candidates} == pytest.approx(tried, rel=1e-3, abs=1e-5)
        assert step.perplexity == pytest.approx(each["perplexity"], rel=1e-4)
        assert [c.perplexity for c in step.candidates if not c.chosen] == [None] * (len(tried) - 1)
        assert step.score == min(c.score for c in step.candidates)


def target(num_blocks: int) -> SearchTarget:
    return SearchTarget(num_blocks=num_blocks, whole_layers=True)


def test_some_settings_refuse_a_merge_and_some_merge_what_was_merged_before() -> None:
    """So that the test above covers both."""
    found = [algorithm_1(tiny_model(num_hidden_layers=LAYERS), settings) for settings in SETTINGS]
    assert any(len(each["tried"]) > 1 for accepted in found for each in accepted)
    into = [[each["into"] for each in accepted] for accepted in found]
    gone = [[index for each in accepted for index in each["gone"]] for accepted in found]
    assert any(set(ins) & set(outs) for ins, outs in zip(into, gone, strict=True))


def test_coefficients_of_nested_merges() -> None:
    first, second = LayerMerge(layer_index=5, merged=(6, 7)), LayerMerge(layer_index=4, merged=(5,))
    assert combinations([first]) == {5: {5: -1, 6: 1, 7: 1}}
    assert combinations([first, second]) == {4: {5: -1, 6: 1, 7: 1}}  # theta_4 + (theta_5* - theta_4)
    third = LayerMerge(layer_index=3, merged=(4,))
    assert combinations([first, LayerMerge(layer_index=3, merged=(4, 5))]) == {3: {3: -1, 4: 1, 5: -1, 6: 1, 7: 1}}
    assert combinations([first, third])[3] == {4: 1}
    for merges in ([first], [first, second]):
        assert all(sum(made.values()) == 1 for made in combinations(merges).values())


def test_a_search_goes_on_and_ends_at_the_first_merge_that_reaches_its_target(tmp_path: Path) -> None:
    settings = SETTINGS[-1]
    whole = laco(tmp_path / "whole", tiny_model(num_hidden_layers=LAYERS), settings).run(target(8))
    assert sum(len(step.blocks) for step in whole) >= 8
    first = laco(tmp_path / "parts", tiny_model(num_hidden_layers=LAYERS), settings).run(target(2))
    assert len(first) == 1, "a merge takes several layers at once"
    then = laco(tmp_path / "parts", tiny_model(num_hidden_layers=LAYERS), settings).run(target(8))
    assert without_seconds(then) == without_seconds(whole)
    assert without_seconds(first) == without_seconds(whole)[:1]


def without_seconds(steps: Sequence[SearchStep]) -> list[str]:
    return [step.model_copy(update={"seconds": 0.0}).model_dump_json() for step in steps]


def test_a_target_that_the_threshold_does_not_allow_is_one_clear_line(tmp_path: Path) -> None:
    settings = LacoSettings(layers_per_merge=2, threshold=0.9999)
    with pytest.raises(ConfigurationError, match="lower --laco-threshold") as caught:
        laco(tmp_path, tiny_model(num_hidden_layers=LAYERS), settings).run(target(4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (LacoSettings(last_layer=9), "laco_last_layer is 9, and the model has 8"),
        (LacoSettings(layers_per_merge=5, first_layer=4), "laco_layers_per_merge is 5"),
        (LacoSettings(layers_per_merge=9), "laco_layers_per_merge is 9"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(tmp_path: Path, settings: LacoSettings, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        laco(tmp_path, tiny_model(num_hidden_layers=LAYERS), settings)


def test_layers_get_their_own_weights_back(tmp_path: Path) -> None:
    model = tiny_model(num_hidden_layers=LAYERS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = MergedLayers(row_of(model), model, torch.float32)
    one, two = LayerMerge(layer_index=2, merged=(3, 4)), LayerMerge(layer_index=0, merged=(1, 2))
    layers.use([one, two])
    after_two = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers.use([one])
    layers.use([])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    layers.use([one, two])
    survives = [name for name in before if not any(f"layers.{gone}." in name for gone in (1, 2, 3, 4))]
    assert all(torch.equal(model.state_dict()[name], after_two[name]) for name in survives)
    by_hand = rdsc(rdsc(layer_weights(tiny_model(num_hidden_layers=LAYERS)), 2, 2), 0, 2)
    for name, expected in by_hand[0].items():
        torch.testing.assert_close(model.state_dict()[f"model.layers.0.{name}"], expected)


MERGES = (LayerMerge(layer_index=2, merged=(3,)), LayerMerge(layer_index=0, merged=(1,)))
GONE: tuple[Block, ...] = (*both_of(3), *both_of(1))


def test_an_export_holds_the_merged_weights(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(save_tiny_model(tmp_path / "model", "llama")))
    write_export(checkpoint, GONE, tmp_path / "export", merges=MERGES)
    model = tiny_model("llama")
    by_hand = rdsc(rdsc(layer_weights(model), 2, 1), 0, 1)
    held = load_file(tmp_path / "export" / "model.safetensors")
    assert {name for name in held if ".layers." in name} == {
        f"model.layers.{index}.{name}" for index in range(2) for name in by_hand[0]
    }
    for index in range(2):
        for name, expected in by_hand[index].items():
            torch.testing.assert_close(held[f"model.layers.{index}.{name}"], expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    with torch.inference_mode():
        torch.testing.assert_close(loaded(TOKENS).logits, smaller(model, by_hand)(TOKENS).logits, rtol=0, atol=1e-4)


def test_bfloat16_weights_are_rounded_once_and_the_same_everywhere(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder)
    checkpoint = Checkpoint.open(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    row = row_of(model)
    stored = stored_dtype(row, checkpoint)
    assert stored == torch.bfloat16
    three = LayerMerge(layer_index=0, merged=(1, 2, 3))
    MergedLayers(row, model, stored).use([three])
    write_export(
        checkpoint, [block for index in (1, 2, 3) for block in both_of(index)], tmp_path / "out", merges=[three]
    )
    held = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in held.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.float(), model.state_dict()[name]), name


def test_layers_that_are_not_alike_are_refused() -> None:
    check_mergeable(row_of(tiny_model("qwen2")), tiny_model("qwen2"))
    mixed = TINY_FAMILIES["qwen2_moe-mixed"]()
    with pytest.raises(ConfigurationError, match="layer 1 has other weights than layer 0"):
        check_mergeable(row_of(mixed), mixed)


def test_quantized_layers_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = save_tiny_model(tmp_path / "model", "llama")
    held = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**held, name: held[name].to(torch.int8)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match="held as float32, int8"):
        stored_dtype(row_of(tiny_model("llama")), Checkpoint.open(str(folder)))
