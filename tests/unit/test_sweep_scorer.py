"""The sweep against the plain scorer, which other tests hold against a forward written out by hand."""

from __future__ import annotations

import random

import pytest
import torch

from blockpruner.architectures import architecture_of
from blockpruner.blocks import Block, all_blocks, mha, mlp
from blockpruner.scoring.plain import PlainScorer
from blockpruner.scoring.sweep import SweepScorer
from blockpruner.scoring.table import ScoreTable
from tests.tiny_models import TINY_FAMILIES

NUM_SEQUENCES, SEQUENCE_LENGTH = 5, 12


def filled(scorer: PlainScorer | SweepScorer, removed: tuple[Block, ...], candidates: list[Block]) -> ScoreTable:
    table = ScoreTable.empty(candidates, scorer.num_sequences)
    scorer.fill(removed, table, lambda _: None)
    return table


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
@pytest.mark.parametrize("micro_batch", [1, 3, None])
def test_sweep_equals_a_forward_per_candidate(family: str, micro_batch: int | None) -> None:
    model = TINY_FAMILIES[family]()
    architecture = architecture_of(model.config.model_type)
    draw = random.Random(f"{family} {micro_batch}")
    blocks = all_blocks(model.config.num_hidden_layers)
    generator = torch.Generator().manual_seed(1)
    token_ids_BT = torch.randint(model.config.vocab_size, (NUM_SEQUENCES, SEQUENCE_LENGTH), generator=generator)
    plain = PlainScorer(architecture, model, token_ids_BT, 2)
    sweep = SweepScorer(architecture, model, token_ids_BT, micro_batch)
    for num_removed in (0, 1, 3, len(blocks) - 2):
        removed = tuple(draw.sample(blocks, num_removed))
        candidates = [block for block in blocks if block not in removed and draw.random() < 0.8] or [
            next(block for block in blocks if block not in removed)
        ]
        expected, table = filled(plain, removed, candidates), filled(sweep, removed, candidates)
        assert table.is_complete
        torch.testing.assert_close(table.nll_CB, expected.nll_CB, rtol=0, atol=1e-5)


def test_a_resumed_sweep_is_bit_identical() -> None:
    model = TINY_FAMILIES["llama"]()
    architecture = architecture_of("llama")
    token_ids_BT = torch.arange(NUM_SEQUENCES * SEQUENCE_LENGTH).view(NUM_SEQUENCES, SEQUENCE_LENGTH) % 50
    scorer = SweepScorer(architecture, model, token_ids_BT, 2)
    removed, candidates = (mlp(0),), [mha(0), mha(1), mlp(1), mha(2)]
    whole = filled(scorer, removed, candidates)
    resumed = ScoreTable.empty(candidates, NUM_SEQUENCES)
    resumed.fill(slice(0, 4), slice(0, 2), whole.nll_CB[:, :2])
    columns_done = []
    scorer.fill(removed, resumed, lambda table: columns_done.append(int(table.done_CB[0].sum())))
    assert columns_done == [4, 5]  # the first micro-batch was not computed again
    assert torch.equal(resumed.nll_CB, whole.nll_CB)
    assert "forward" not in vars(architecture.decoder_layers(model)[0])
