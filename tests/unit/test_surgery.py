"""Surgery: where every surviving block goes, for all ways of removing blocks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockpruner.architectures import architecture_of
from blockpruner.blocks import Block, BlockKind, all_blocks, mha, mlp
from blockpruner.errors import ExportError
from blockpruner.export.write import choose_format
from blockpruner.surgery import PackedLayer, PackedModel, custom_names, pack, rename, stock_names

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
def test_custom_names_put_every_surviving_tensor_in_its_place(case: tuple[int, frozenset[Block]]) -> None:
    num_layers, removed = case
    packed = pack(num_layers, removed)
    names = custom_names(LLAMA, packed)
    renamed = [rename(tensor, names) for block in flattened(packed) for tensor in tensors_of(block)]
    expected = []
    for new, layer in enumerate(packed.layers):
        at = f"model.layers.{new}"
        for position in range(len(layer.leading_mlps)):
            expected += [f"{at}.leading_mlps.{position}.{name}" for name in MLP_TENSORS]
        expected += [f"{at}.{name}" for name in MHA_TENSORS]
        for position in range(len(layer.mlps)):
            expected += [f"{at}.mlps.{position}.{name}" for name in MLP_TENSORS]
    assert renamed == expected


def test_stock_names_renumber_attention_and_feed_forward_each_from_its_own_layer() -> None:
    names = stock_names(LLAMA, pack(12, [mlp(1), mha(2), mlp(8), mha(9)]))
    assert rename("model.layers.2.mlp.up_proj.weight", names) == "model.layers.1.mlp.up_proj.weight"
    assert rename("model.layers.2.post_attention_layernorm.weight", names).startswith("model.layers.1.post_")
    assert rename("model.layers.1.self_attn.q_proj.bias", names) == "model.layers.1.self_attn.q_proj.bias"
    assert rename("model.layers.11.self_attn.q_proj.weight", names) == "model.layers.9.self_attn.q_proj.weight"
    assert rename("model.layers.11.input_layernorm.weight", names) == "model.layers.9.input_layernorm.weight"
    assert rename("model.layers.9.mlp.up_proj.weight", names) == "model.layers.7.mlp.up_proj.weight"


def test_a_removed_tensor_has_no_new_name() -> None:
    names = custom_names(LLAMA, pack(3, [mlp(1)]))
    with pytest.raises(KeyError):
        rename("model.layers.1.mlp.up_proj.weight", names)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_without_any_attention_there_is_no_export(num_layers: int) -> None:
    with pytest.raises(ExportError, match="no attention block is left") as caught:
        pack(num_layers, all_blocks(num_layers, "mha"))
    assert "\n" not in str(caught.value)


STOCK = PackedModel(layers=(PackedLayer(mha=0, mlps=(0,)),))
CUSTOM = PackedModel(layers=(PackedLayer(mha=0, mlps=(0, 1)),))


def test_format_follows_the_layout_unless_one_is_asked_for() -> None:
    assert choose_format(STOCK, "auto") == "stock"
    assert choose_format(CUSTOM, "auto") == "transformers"
    assert choose_format(STOCK, "stock") == "stock"
    assert choose_format(STOCK, "transformers") == "transformers"


def test_stock_is_refused_where_blocks_do_not_alternate() -> None:
    with pytest.raises(ExportError, match="format stock") as caught:
        choose_format(CUSTOM, "stock")
    assert "\n" not in str(caught.value)
