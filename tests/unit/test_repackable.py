"""What can be repacked, and how its removals are chosen, against trying everything out."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from itertools import chain, combinations

import pytest

from blockpruner.blocks import Block, all_blocks
from blockpruner.errors import ExportError
from blockpruner.repackable import Repackable, spare_blocks
from blockpruner.surgery import pack, whole_layers

NUM_LAYERS = 3
BLOCKS = all_blocks(NUM_LAYERS)
either_layout = pytest.mark.parametrize("is_parallel", [False, True])


def subsets(blocks: Iterable[Block]) -> list[frozenset[Block]]:
    blocks = list(blocks)
    return [frozenset(each) for each in chain.from_iterable(combinations(blocks, n) for n in range(len(blocks) + 1))]


def is_repackable(removed: frozenset[Block], is_parallel: bool) -> bool:
    """By what the export itself says; a model without any layer counts, for a pair may be its last."""
    if len(removed) == len(BLOCKS):
        return True
    if is_parallel:
        return bool(whole_layers(NUM_LAYERS, removed))
    try:
        return pack(NUM_LAYERS, removed).is_stock
    except ExportError:
        return False


@either_layout
def test_every_set_of_removals(is_parallel: bool) -> None:
    for removed in subsets(BLOCKS):
        later = [more for more in subsets(set(BLOCKS) - removed) if is_repackable(removed | more, is_parallel)]
        assert spare_blocks(NUM_LAYERS, removed, is_parallel=is_parallel) == min(map(len, later)), removed
        assert Repackable(NUM_LAYERS, is_parallel).is_done(removed) == is_repackable(removed, is_parallel)


@either_layout
def test_the_cheapest_pair_goes_the_less_important_block_first(is_parallel: bool) -> None:
    draw = random.Random(is_parallel)
    repackable = Repackable(NUM_LAYERS, is_parallel)
    for removed in subsets(BLOCKS):
        left = [block for block in BLOCKS if block not in removed]
        if not is_repackable(removed, is_parallel) or len(left) < 4:
            continue
        nats = {block: draw.choice([draw.random(), draw.random(), math.nan, math.inf]) for block in left}
        cost = {block: value if math.isfinite(value) else math.inf for block, value in nats.items()}
        pairs = [pair for pair in combinations(left, 2) if is_repackable(removed | set(pair), is_parallel)]
        first = repackable.choose(removed, nats)
        cheapest = min(cost[a] + cost[b] for a, b in pairs)
        assert cheapest in [cost[a] + cost[b] for a, b in pairs if first in (a, b)]
        gone = removed | {first}
        rest = {block: value for block, value in nats.items() if block != first}
        second = repackable.choose(gone, rest)
        completing = [block for block in rest if is_repackable(gone | {block}, is_parallel)]
        assert cost[second] == min(cost[block] for block in completing)
        assert cost[first] <= cost[second] or math.isinf(cheapest)
        assert repackable.is_done(gone | {second})
