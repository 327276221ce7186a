"""Masking: a masked block is not there, and afterwards the model is as it was, whatever happened."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.architectures import architecture_of, block_modules
from blockpruner.blocks import Block, all_blocks, mha, mlp
from blockpruner.masking import masked
from tests.oracles import oracle_logits
from tests.scorers import row_of
from tests.tiny_models import TINY_FAMILIES, tiny_model, tiny_token_ids

every_family = pytest.mark.parametrize("family", TINY_FAMILIES)
TOKENS = tiny_token_ids(2, 20, seed=3)
LLAMA = architecture_of("llama")


def subsets(seed: int) -> list[list[Block]]:
    """Each kind alone, both ends, everything, and random ones, in random order."""
    draw = random.Random(seed)
    fixed = [[mha(0)], [mlp(0)], [mha(3), mlp(3)], list(all_blocks(4, "mha")), list(all_blocks(4, "mlp"))]
    return [*fixed, list(all_blocks(4)), *(draw.sample(all_blocks(4), draw.randint(1, 7)) for _ in range(6))]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        answer: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return answer


def removed(blocks: Iterable[Block]) -> set[tuple[int, str]]:
    return {(block.layer_index, block.block_kind.value) for block in blocks}


def attributes(model: PreTrainedModel) -> dict[str, set[str]]:
    """What every module holds of its own: a bypass that is left behind shows as `forward`."""
    return {name: set(vars(module)) for name, module in model.named_modules()}


@every_family
def test_masked_logits_are_those_of_a_forward_without_the_blocks(family: str) -> None:
    model = tiny_model(family)
    architecture = row_of(model)
    tensors, config = model.state_dict(), model.config.to_dict()
    dense = logits(model)
    for blocks in subsets(seed=len(family)):
        expected = oracle_logits(tensors, config, TOKENS, removed(blocks))
        with masked(architecture, model, blocks):
            actual = logits(model)
        assert (actual - expected).abs().max() <= 1e-5, blocks
        assert (actual - dense).abs().max() > 1e-2, "a mask that does nothing would not be noticed"


@every_family
def test_masking_restores_the_model_exactly(family: str) -> None:
    model = tiny_model(family)
    architecture = row_of(model)
    before, own = logits(model), attributes(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for blocks in subsets(seed=1):
        with masked(architecture, model, blocks):
            logits(model)
            assert attributes(model) != own
        assert attributes(model) == own
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_masking_restores_the_model_after_an_exception() -> None:
    model = tiny_model()
    before, own = logits(model), attributes(model)
    with pytest.raises(KeyboardInterrupt), masked(LLAMA, model, [mha(1), mlp(2)]):
        raise KeyboardInterrupt
    assert attributes(model) == own
    assert torch.equal(logits(model), before)


def test_masking_restores_the_model_when_a_later_block_does_not_exist() -> None:
    model = tiny_model()
    own = attributes(model)
    with pytest.raises(IndexError), masked(LLAMA, model, [mha(1), mlp(2), mha(99)]):
        raise AssertionError("entered")
    assert attributes(model) == own


def test_nested_masks_add_up_and_end_one_by_one() -> None:
    model = tiny_model()
    tensors, config = model.state_dict(), model.config.to_dict()
    own = attributes(model)

    def is_without(*blocks: Block) -> bool:
        return bool((logits(model) - oracle_logits(tensors, config, TOKENS, removed(blocks))).abs().max() <= 1e-5)

    with masked(LLAMA, model, [mha(0)]):
        with masked(LLAMA, model, [mlp(2), mha(0)]):
            assert is_without(mha(0), mlp(2))
        assert is_without(mha(0))
        with pytest.raises(ValueError, match="inner"), masked(LLAMA, model, [mha(0), mlp(1)]):
            raise ValueError("inner")
        assert is_without(mha(0))
    assert is_without()
    assert attributes(model) == own


def test_a_block_given_twice_is_masked_once_and_restored() -> None:
    model = tiny_model()
    before, own = logits(model), attributes(model)
    with masked(LLAMA, model, [mha(1), mha(1)]):
        logits(model)
    assert attributes(model) == own
    assert torch.equal(logits(model), before)


def test_a_mask_of_nothing_changes_nothing() -> None:
    model = tiny_model()
    own = attributes(model)
    with masked(LLAMA, model, []):
        assert attributes(model) == own


@every_family
def test_a_masked_block_costs_nothing(family: str) -> None:
    """Its weights are not read: they may as well be broken, the norm's too."""
    model = tiny_model(family)
    row = row_of(model)
    expected = oracle_logits(model.state_dict(), model.config.to_dict(), TOKENS, {(1, "mha"), (2, "mlp")})
    for block in (mha(1), mlp(2)):
        for module in block_modules(row, model, block):
            for parameter in module.parameters():
                parameter.fill_(torch.nan)
    with masked(row, model, [mha(1), mlp(2)]):
        assert (logits(model) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["cohere", "cohere2", "falcon-one-norm", "falcon-multi-query"])
def test_a_norm_that_serves_both_blocks_stays_until_both_are_gone(family: str) -> None:
    model = tiny_model(family)
    row = row_of(model)
    expected = oracle_logits(model.state_dict(), model.config.to_dict(), TOKENS, {(1, "mha"), (1, "mlp")})
    for parameter in row.decoder_layers(model)[1].get_submodule(row.shared[0]).parameters():
        parameter.fill_(torch.nan)
    for block in (mha(1), mlp(1)):
        with masked(row, model, [block]):
            assert logits(model).isnan().all()
    with masked(row, model, [mha(1), mlp(1)]):
        assert (logits(model) - expected).abs().max() <= 1e-5
