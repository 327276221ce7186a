"""Token ids from rows: against the reference implementation's own steps, written out here."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockpruner.calibration import TOKEN_FILE, cut_into_sequences, load_token_ids, paper_sample, save_token_ids
from blockpruner.errors import ArtifactError, ConfigurationError, TextSourceError
from tests.tiny_models import BOS, tiny_rows, tiny_tokenizer


@given(st.integers(1, 500), st.data(), st.integers(0, 2**32 - 1))
def test_the_draw_is_the_global_generators(num_rows: int, data: st.DataObject, seed: int) -> None:
    num_samples = data.draw(st.integers(1, num_rows))
    random.seed(seed)
    expected = random.sample(range(num_rows), num_samples)
    assert paper_sample(num_rows, num_samples, seed) == expected


def test_the_draw_leaves_the_global_generator_alone() -> None:
    random.seed(7)
    expected = random.random()
    random.seed(7)
    paper_sample(10, 3, 42)
    assert random.random() == expected


def test_the_papers_draw_is_pinned() -> None:
    # 256 of the 5200 rows that the Alpaca recipe leaves, seed 42: the numbers CPython has given since 3.2.
    assert paper_sample(5200, 256, 42)[:6] == [912, 204, 2253, 2006, 1828, 1143]


def test_too_many_samples() -> None:
    with pytest.raises(
        TextSourceError, match=r"^11 samples were asked for, the text has 10 rows; ask for at most 10, or for all"
    ):
        paper_sample(10, 11, 42)


@pytest.mark.parametrize("sequence_length", [2, 7, 64])
def test_cutting_is_the_references(sequence_length: int) -> None:
    rows, tokenizer = tiny_rows(12), tiny_tokenizer()
    # The reference: encode the joined text as one batch of one, then take slices of it.
    encoded = tokenizer("\n\n".join(rows), return_tensors="pt")["input_ids"]
    num_sequences = encoded.shape[1] // sequence_length
    expected = [encoded[0, n * sequence_length : (n + 1) * sequence_length] for n in range(num_sequences)]
    token_ids_BT = cut_into_sequences(rows, tokenizer, sequence_length)
    assert token_ids_BT.dtype == torch.int64
    assert torch.equal(token_ids_BT, torch.stack(expected))
    assert encoded.shape[1] % sequence_length, "the test wants a tail to drop"


def test_special_tokens_come_once() -> None:
    tokenizer = tiny_tokenizer()
    token_ids_BT = cut_into_sequences(tiny_rows(20), tokenizer, 16)
    begin = tokenizer.convert_tokens_to_ids(BOS)
    assert token_ids_BT.flatten().tolist().count(begin) == 1
    assert token_ids_BT[0, 0] == begin


def test_a_long_text_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    rows = tiny_rows(50)
    assert len(tiny_tokenizer()("\n\n".join(rows), verbose=False)["input_ids"]) > tiny_tokenizer().model_max_length
    with caplog.at_level(logging.WARNING):
        cut_into_sequences(rows, tiny_tokenizer(), 16)
    assert caplog.messages == []


def test_too_short_for_one_sequence() -> None:
    rows = tiny_rows(2)
    num_tokens = len(tiny_tokenizer()("\n\n".join(rows))["input_ids"])
    with pytest.raises(TextSourceError, match=f"{num_tokens} tokens from 2 rows, one sequence needs 4096"):
        cut_into_sequences(rows, tiny_tokenizer(), 4096)
    assert cut_into_sequences(rows, tiny_tokenizer(), num_tokens).shape == (1, num_tokens)


@pytest.mark.parametrize("sequence_length", [1, 0, -5])
def test_a_sequence_predicts_something(sequence_length: int) -> None:
    with pytest.raises(ConfigurationError, match=f"sequence length of {sequence_length} leaves nothing to predict"):
        cut_into_sequences(tiny_rows(2), tiny_tokenizer(), sequence_length)


def test_ids_survive_the_file(tmp_path: Path) -> None:
    token_ids_BT = cut_into_sequences(tiny_rows(20), tiny_tokenizer(), 16)
    save_token_ids(token_ids_BT, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [TOKEN_FILE]
    assert torch.equal(load_token_ids(tmp_path), token_ids_BT)


@pytest.mark.parametrize("content", [None, b"", b"no safetensors file at all"])
def test_a_file_without_ids(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / TOKEN_FILE).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"tokens.safetensors holds no token ids"):
        load_token_ids(tmp_path)
