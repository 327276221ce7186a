"""Perplexity as the paper counts it, against sums written out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from blockpruner.perplexity import default_batch_size, perplexity, sequence_nll
from blockpruner.progress import Progress
from tests.oracles import oracle_logits, oracle_perplexity, oracle_sequence_nll
from tests.tiny_models import TINY_FAMILIES, VOCAB_SIZE, tiny_model, tiny_token_ids

TOKENS = tiny_token_ids(5, 24, seed=2)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_nll_is_that_of_the_hand_written_forward(family: str) -> None:
    model = tiny_model(family)
    expected = oracle_sequence_nll(oracle_logits(model.state_dict(), model.config.to_dict(), TOKENS), TOKENS)
    actual = sequence_nll(model, TOKENS)
    assert actual.dtype == torch.float64
    assert actual.shape == (5,)
    assert (actual - expected).abs().max() <= 1e-5
    assert perplexity(actual) == pytest.approx(oracle_perplexity(expected), rel=1e-5)
    assert perplexity(actual) > 1.2 * VOCAB_SIZE, "random weights that answer nothing would agree by chance"


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_the_batch_size_changes_nothing(batch_size: int) -> None:
    """No sequence sees another one, and the last, smaller batch is not lost."""
    model = tiny_model("qwen2")
    alone = torch.cat([sequence_nll(model, row[None]) for row in TOKENS])
    together = sequence_nll(model, TOKENS, batch_size)
    assert (together - alone).abs().max() <= 1e-6


def test_progress_is_told_after_every_batch() -> None:
    reports: list[Progress] = []
    sequence_nll(tiny_model(), TOKENS, 2, reports.append)
    assert [(report.done, report.total, report.unit) for report in reports] == [
        (2, 5, "sequences"),
        (4, 5, "sequences"),
        (5, 5, "sequences"),
    ]


def test_losses_are_float32_or_wider_whatever_the_weights_are() -> None:
    """In bfloat16 a loss of 5 has steps of 1/32: rounding there would show at once."""
    model = tiny_model().bfloat16()
    logits = model(input_ids=TOKENS, use_cache=False).logits.float()
    assert (sequence_nll(model, TOKENS, 5) - oracle_sequence_nll(logits, TOKENS)).abs().max() <= 1e-5


def test_two_tokens_are_enough() -> None:
    model, pair = tiny_model(), tiny_token_ids(3, 2)
    expected = oracle_sequence_nll(oracle_logits(model.state_dict(), model.config.to_dict(), pair), pair)
    assert (sequence_nll(model, pair) - expected).abs().max() <= 1e-5


def test_perplexity_is_exp_of_the_mean_over_sequences() -> None:
    assert perplexity(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)) == pytest.approx(math.exp(3.0), rel=1e-15)
    assert perplexity(torch.zeros(4, dtype=torch.float64)) == 1.0


def test_perplexity_of_what_overflows_is_infinite() -> None:
    assert perplexity(torch.tensor([1000.0], dtype=torch.float64)) == math.inf
    assert perplexity(torch.tensor([1.0, math.inf], dtype=torch.float64)) == math.inf
    assert math.isnan(perplexity(torch.tensor([1.0, math.nan], dtype=torch.float64)))


def test_the_default_batch_keeps_the_logits_small() -> None:
    for sequence_length, vocab_size in ((2048, 32_000), (2048, 152_000), (256, 512), (8192, 256_000)):
        batch = default_batch_size(sequence_length, vocab_size)
        assert batch >= 1
        assert batch == 1 or batch * sequence_length * vocab_size * 4 <= 256 * 2**20
    assert default_batch_size(256, 512) > 1
