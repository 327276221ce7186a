"""Whatever is removed, asked for, cut and kept: the sweep's scores are those of a forward per candidate."""

from __future__ import annotations

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, equal
from torch.testing import assert_close
from transformers import PreTrainedModel

from blockpruner.blocks import Block, all_blocks
from blockpruner.scoring.snapshots import choose_positions
from tests.scorers import filled, plain_scorer, sweep_scorer
from tests.tiny_models import tiny_model, tiny_token_ids

TOKENS = tiny_token_ids(4, 8, seed=2)


@functools.cache
def model_of(num_layers: int) -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=num_layers)


@functools.cache
def plain_nll(num_layers: int, removed: frozenset[Block], candidate: Block) -> Tensor:
    return filled(plain_scorer(model_of(num_layers), TOKENS), tuple(removed), (candidate,)).nll_CB[0]


@st.composite
def searches(draw: st.DrawFn) -> tuple[int, list[Block], list[Block]]:
    """A number of layers, blocks of the kinds that may go, and those that go, one after the other."""
    num_layers = draw(st.integers(1, 5))
    blocks = list(all_blocks(num_layers, draw(st.sampled_from(["mha", "mlp", "both"]))))
    return num_layers, blocks, draw(st.permutations(blocks))[: len(blocks) - 1]


@settings(max_examples=40)
@given(searches(), st.integers(1, 5), st.integers(1, 6), st.sampled_from([0, 3_000, 12_000, 10**7]))
def test_every_step_of_every_search(
    search: tuple[int, list[Block], list[Block]], micro_batch: int, branches_per_chunk: int, snapshot_bytes: int
) -> None:
    num_layers, blocks, order = search
    scorer = sweep_scorer(
        model_of(num_layers),
        TOKENS,
        micro_batch=micro_batch,
        branches_per_chunk=branches_per_chunk,
        snapshot_bytes=snapshot_bytes,
    )
    for step in range(len(order)):
        removed = order[:step]
        candidates = [block for block in blocks if block not in removed]
        table = filled(scorer, removed, candidates)
        assert table.is_complete
        for row, candidate in enumerate(candidates):
            expected_B = plain_nll(num_layers, frozenset(removed), candidate)
            assert_close(table.nll_CB[row], expected_B, rtol=0, atol=1e-5)
        assert scorer.snapshots.device_bytes <= 2 * snapshot_bytes, "a chunk's tensor may serve two snapshots"


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=12),
    st.data(),
    st.integers(0, 300),
)
def test_the_chosen_snapshots_fit_and_none_of_them_is_idle(
    weights: list[float], data: st.DataObject, budget: int
) -> None:
    costs = sorted(data.draw(st.lists(st.integers(0, 100), min_size=len(weights), max_size=len(weights))))
    sizes = {position: data.draw(st.integers(1, 100)) for position in range(1, len(weights))}
    kept = choose_positions(weights, costs, sizes, budget)
    assert kept <= set(sizes)
    assert sum(sizes[position] for position in kept) <= budget

    def savings(positions: frozenset[int]) -> float:
        return sum(
            weight * costs[max((at for at in positions if at <= unit), default=0)]
            for unit, weight in enumerate(weights)
            if any(at <= unit for at in positions)
        )

    alone = [savings(frozenset({position})) for position, size in sizes.items() if size <= budget]
    assert savings(kept) > 0 or not any(value > 0 for value in alone)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.data(), st.integers(0, 12))
def test_snapshots_are_chosen_as_by_a_look_at_every_position_before_every_choice(
    weights: list[int], data: st.DataObject, budget: int
) -> None:
    """Few values, so that many positions are worth the same: the first of them goes."""
    costs = sorted(data.draw(st.lists(st.integers(0, 3), min_size=len(weights), max_size=len(weights))))
    sizes = {position: data.draw(st.integers(1, 2)) for position in range(1, len(weights))}
    expected: set[int] = set()
    left = budget
    while fitting := [at for at, size in sizes.items() if at not in expected and size <= left]:
        begins = [max((costs[at] for at in expected if at <= unit), default=0) for unit in range(len(weights))]
        worth = {
            at: sum(weights[unit] * max(0.0, costs[at] - begins[unit]) for unit in range(at, len(weights))) / sizes[at]
            for at in fitting
        }
        best = max(worth, key=lambda at: worth[at])
        if worth[best] <= 0:
            break
        expected.add(best)
        left -= sizes[best]
    assert choose_positions(weights, costs, sizes, budget) == expected


def test_with_room_for_all_the_sweep_goes_on_right_at_the_removed_block() -> None:
    model, blocks = model_of(4), all_blocks(4)
    scorer = sweep_scorer(model, TOKENS, snapshot_bytes=10**9)
    filled(scorer, (), blocks)
    before = scorer.meter.flops_saved
    removed = blocks[5]
    table = filled(scorer, (removed,), [block for block in blocks if block != removed])
    costs = scorer.costs.walk(scorer.units, (removed,), table.candidates)
    assert scorer.meter.flops_saved - before == costs[5] * TOKENS.numel()
    fresh = filled(sweep_scorer(model, TOKENS), (removed,), table.candidates)
    assert equal(table.nll_CB, fresh.nll_CB)
