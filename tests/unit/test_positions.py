"""How many positions a model knows: of every family of the tests, against what running them says."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from blockpruner.errors import ConfigurationError
from blockpruner.positions import check_sequence_length, num_positions
from tests.tiny_models import TINY_FAMILIES, tiny_model, tiny_token_ids

WITH_TABLE = {"gpt2", "gpt2-scaled", "opt"}


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_only_a_table_of_positions_has_an_end(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(family, max_position_embeddings=32)
    assert num_positions(model) == (32 if family in WITH_TABLE else None)
    check_sequence_length(model, 32)
    model(input_ids=tiny_token_ids(1, 32))
    if family in WITH_TABLE:
        with pytest.raises(ConfigurationError, match="knows 32 positions; give --sequence-length 32 or less"):
            check_sequence_length(model, 33)
        with pytest.raises(IndexError):
            model(input_ids=tiny_token_ids(1, 33))
        assert not caplog.records
    else:
        assert not caplog.records
        check_sequence_length(model, 33)
        assert "sequence_length is 33, and the model is made for 32 positions" in caplog.text
        model(input_ids=tiny_token_ids(1, 33))


@pytest.mark.parametrize("model_type", ["gptj", "gpt_neo", "biogpt"])
def test_families_that_are_only_measured_have_tables_too(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, max_position_embeddings=24, n_positions=24)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert num_positions(model) == 24
