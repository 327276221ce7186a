"""Surgery: where every surviving block goes, for all ways of removing blocks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpruner.architectures import architecture_of
from blockpruner.blocks import Block, BlockKind, all_blocks, mha, mlp
from blockpruner.errors import ExportError
from blockpruner.surgery import PackedModel, custom_places, pack, stock_places, whole_layers

LLAMA = architecture_of("llama")
MHA_TENSORS = ("input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.o_proj.weight")
MLP_TENSORS = ("post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.down_proj.weight")


@st.composite
def removals(draw: st.DrawFn) -> tuple[int, frozenset[Block]]:
    """A number of layers and blocks to remove, of which at least one attention stays."""
    num_layers = draw(st.integers(1, 14))
    removed = draw(st.sets(st.sampled_from(all_blocks(num_layers))))
    removed.discard(mha(draw(st.integers(0, num_layers - 1))))
    return num_layers, frozenset(removed)


def flattened(packed: PackedModel) -> list[Block]:
    """The blocks in the order in which the smaller model computes them."""
    return [
        block
        for layer in packed.layers
        for block in (*map(mlp, layer.leading_mlps), mha(layer.mha), *map(mlp, layer.mlps))
    ]


def tensors_of(block: Block) -> list[str]:
    names = MHA_TENSORS if block.block_kind is BlockKind.MHA else MLP_TENSORS
    return [f"model.layers.{block.layer_index}.{name}" for name in names]


@given(removals())
@settings(max_examples=300)
def test_the_smaller_model_computes_exactly_the_survivors_in_order(case: tuple[int, frozenset[Block]]) -> None:
    num_layers, removed = case
    expected = [block for block in all_blocks(num_layers) if block not in removed]
    packed = pack(num_layers, removed)
    assert flattened(packed) == expected
    assert all(not layer.leading_mlps for layer in packed.layers[1:])


@given(removals())
@settings(max_examples=300)
def test_stock_exactly_when_the_survivors_alternate(case: tuple[int, frozenset[Block]]) -> None:
    num_layers, removed = case
    letters = {BlockKind.MHA: "A", BlockKind.MLP: "M"}
    kinds = "".join(letters[block.block_kind] for block in all_blocks(num_layers) if block not in removed)
    assert pack(num_layers, removed).is_stock == (kinds == "AM" * (len(kinds) // 2))


@pytest.mark.parametrize(
    ("removed", "layers", "is_stock"),
    [
        ([], [((), 0, (0,)), ((), 1, (1,)), ((), 2, (2,)), ((), 3, (3,))], True),
        ([mlp(1), mha(2)], [((), 0, (0,)), ((), 1, (2,)), ((), 3, (3,))], True),
        ([mha(0)], [((0,), 1, (1,)), ((), 2, (2,)), ((), 3, (3,))], False),
        ([mlp(0)], [((), 0, ()), ((), 1, (1,)), ((), 2, (2,)), ((), 3, (3,))], False),
        ([mha(1)], [((), 0, (0, 1)), ((), 2, (2,)), ((), 3, (3,))], False),
        ([mha(3), mlp(3)], [((), 0, (0,)), ((), 1, (1,)), ((), 2, (2,))], True),
        ([mha(0), mlp(0)], [((), 1, (1,)), ((), 2, (2,)), ((), 3, (3,))], True),
        ([mha(0), mha(1), mha(2)], [((0, 1, 2), 3, (3,))], False),
        ([mlp(3)], [((), 0, (0,)), ((), 1, (1,)), ((), 2, (2,)), ((), 3, ())], False),
    ],
)
def test_layouts(
    removed: list[Block], layers: list[tuple[tuple[int, ...], int, tuple[int, ...]]], is_stock: bool
) -> None:
    packed = pack(4, removed)
    assert [(layer.leading_mlps, layer.mha, layer.mlps) for layer in packed.layers] == layers
    assert packed.is_stock is is_stock


@given(removals())
def test_custom_places_put_every_surviving_block_in_its_place(case: tuple[int, frozenset[Block]]) -> None:
    num_layers, removed = case
    packed = pack(num_layers, removed)
    expected: list[str] = []
    for new, layer in enumerate(packed.layers):
        expected += [f"{new}.leading_mlps.{position}" for position in range(len(layer.leading_mlps))]
        expected += [str(new), *(f"{new}.mlps.{position}" for position in range(len(layer.mlps)))]
    places = custom_places(packed)
    assert [places[block] for block in flattened(packed)] == expected
    assert set(places) == set(flattened(packed))


def test_stock_places_renumber_attention_and_feed_forward_each_from_its_own_layer() -> None:
    places = stock_places(pack(12, [mlp(1), mha(2), mlp(8), mha(9)]))
    assert (places[mlp(2)], places[mha(1)], places[mha(11)], places[mlp(9)]) == ("1", "1", "9", "7")
    assert mlp(1) not in places
    assert mha(2) not in places


def test_a_tensor_is_placed_under_whatever_prefix_its_checkpoint_has() -> None:
    assert LLAMA.placed("model.layers.2.mlp.up_proj.weight", "1") == "model.layers.1.mlp.up_proj.weight"
    assert LLAMA.placed("model.layers.11.mlp.up_proj.weight", "0.mlps.3") == "model.layers.0.mlps.3.mlp.up_proj.weight"
    gpt2 = architecture_of("gpt2")
    assert gpt2.placed("h.10.attn.c_attn.weight", "7") == "h.7.attn.c_attn.weight"
    assert gpt2.placed("transformer.h.10.ln_2.bias", "7") == "transformer.h.7.ln_2.bias"
    assert gpt2.block_of_tensor("h.10.attn.c_attn.weight") == mha(10)
    assert architecture_of("mixtral").block_of_tensor("model.layers.3.block_sparse_moe.experts.0.w1.weight") == mlp(3)


@given(removals())
def test_whole_layers(case: tuple[int, frozenset[Block]]) -> None:
    num_layers, removed = case
    halves = [index for index in range(num_layers) if len(removed & {mha(index), mlp(index)}) == 1]
    kept = [index for index in range(num_layers) if not removed & {mha(index), mlp(index)}]
    assert whole_layers(num_layers, removed) == (None if halves else tuple(kept))


@pytest.mark.parametrize("num_layers", [1, 3])
def test_without_any_attention_there_is_no_export(num_layers: int) -> None:
    with pytest.raises(ExportError, match="no attention block is left") as caught:
        pack(num_layers, all_blocks(num_layers, "mha"))
    assert "\n" not in str(caught.value)
