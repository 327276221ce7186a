"""Blocks: their order is the order in which the residual stream meets them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from blockpruner.blocks import Block, BlockKind, all_blocks, mha, mlp, survivors

blocks = st.builds(Block, layer_index=st.integers(0, 40), block_kind=st.sampled_from(BlockKind))


def test_all_blocks_alternate_attention_and_feed_forward() -> None:
    assert all_blocks(3) == (mha(0), mlp(0), mha(1), mlp(1), mha(2), mlp(2))
    assert [block.position for block in all_blocks(3)] == [0, 1, 2, 3, 4, 5]


def test_all_blocks_of_one_kind() -> None:
    assert all_blocks(3, "mha") == (mha(0), mha(1), mha(2))
    assert all_blocks(3, "mlp") == (mlp(0), mlp(1), mlp(2))


@given(st.lists(blocks))
def test_blocks_sort_in_stream_order(some: list[Block]) -> None:
    by_hand = sorted(some, key=lambda block: (block.layer_index, ["mha", "mlp"].index(block.block_kind.value)))
    assert sorted(some) == by_hand


@given(blocks, blocks)
def test_comparison_is_total(one: Block, other: Block) -> None:
    assert (one < other) + (one == other) + (one > other) == 1
    assert (one <= other) == (not one > other)
    assert (hash(one) == hash(other)) or one != other


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.sampled_from(all_blocks(n))))))
def test_survivors_are_the_rest_in_stream_order(case: tuple[int, set[Block]]) -> None:
    num_layers, removed = case
    rest = survivors(num_layers, removed)
    assert list(rest) == sorted(rest)
    assert set(rest) | removed == set(all_blocks(num_layers))
    assert not set(rest) & removed


def test_a_block_reads_as_kind_and_layer_and_round_trips_as_json() -> None:
    assert str(mha(3)) == "mha:3"
    assert str(mlp(11)) == "mlp:11"
    assert mlp(11).model_dump_json() == '{"layer_index":11,"block_kind":"mlp"}'
    assert Block.model_validate_json(mlp(11).model_dump_json()) == mlp(11)


@pytest.mark.parametrize(
    "fields",
    [{"layer_index": -1, "block_kind": "mha"}, {"layer_index": 0, "block_kind": "ffn"}, {"layer_index": 0}],
    ids=["negative layer", "unknown kind", "no kind"],
)
def test_a_block_that_cannot_be_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Block.model_validate(fields)


def test_a_block_does_not_change() -> None:
    with pytest.raises(ValidationError):
        mha(0).layer_index = 1
