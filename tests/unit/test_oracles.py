"""The oracles against transformers: they must be right before anything is held against them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.oracles import ORACLES, oracle_logits, oracle_perplexity, oracle_sequence_nll
from tests.scorers import row_of
from tests.tiny_models import TINY_FAMILIES, VOCAB_SIZE, tiny_model, tiny_rows, tiny_token_ids, tiny_tokenizer

every_family = pytest.mark.parametrize("family", TINY_FAMILIES)


MHA_PROJECTIONS = ("self_attn.o_proj", "self_attn.out_proj", "attn.c_proj", "attention.dense", "self_attention.dense")
MLP_PROJECTIONS = (
    *("mlp.down_proj", "mlp.experts.down_proj", "mlp.shared_expert.down_proj"),
    *("mlp.dense_4h_to_h", "mlp.c_proj", "fc2"),
)
"""What writes to the residual stream, by the names of all families."""


class RecordingTensors(Mapping[str, Tensor]):
    """A state dict that remembers what was read from it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.names_read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.names_read.add(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@every_family
def test_logits_equal_those_of_transformers(family: str) -> None:
    model, token_ids = tiny_model(family), tiny_token_ids(3, 24)
    expected = model(input_ids=token_ids, use_cache=False).logits
    actual = oracle_logits(model.state_dict(), model.config.to_dict(), token_ids)
    assert (actual - expected).abs().max() <= 1e-5
    assert expected.std() > 0.3, "logits that are all alike would agree by chance"


@every_family
def test_float64_is_more_of_the_same(family: str) -> None:
    model, token_ids = tiny_model(family).double(), tiny_token_ids(2, 16)
    model.set_experts_implementation("eager")  # torch's grouped products know no float64
    expected = model(input_ids=token_ids, use_cache=False).logits
    actual = oracle_logits(model.state_dict(), model.config.to_dict(), token_ids, dtype=torch.float64)
    assert actual.dtype == torch.float64
    # transformers computes norms, rotary angles and softmax in float32, whatever the model's dtype.
    assert (actual - expected).abs().max() <= 1e-5


@every_family
def test_every_tensor_is_read_and_a_removed_block_is_not(family: str) -> None:
    model, token_ids = tiny_model(family), tiny_token_ids(1, 8)
    config = model.config.to_dict()
    names = set(model.state_dict()) - ({"lm_head.weight"} if config["tie_word_embeddings"] else set())
    whole, cut = RecordingTensors(model.state_dict()), RecordingTensors(model.state_dict())
    oracle_logits(whole, config, token_ids)
    assert whole.names_read == names
    oracle_logits(cut, config, token_ids, removed={(1, "mha"), (2, "mlp")})
    row = row_of(model)
    gone = tuple(
        f"{row.layers}.{index}.{module}." for index, layout in ((1, row.mha), (2, row.mlp)) for module in layout.modules
    )
    assert cut.names_read == {name for name in names if not name.startswith(gone)}


@every_family
def test_removing_a_block_equals_an_output_projection_of_zeros(family: str) -> None:
    token_ids = tiny_token_ids(2, 20)
    for index, kind, projections in ((0, "mha", MHA_PROJECTIONS), (3, "mlp", MLP_PROJECTIONS)):
        model = tiny_model(family)
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        starts = tuple(f"{row_of(model).layers}.{index}.{projection}" for projection in projections)
        for name, parameter in model.named_parameters():
            if name.startswith(starts):
                parameter.zero_()
        expected = model(input_ids=token_ids, use_cache=False).logits
        actual = oracle_logits(tensors, model.config.to_dict(), token_ids, removed={(index, kind)})
        assert (actual - expected).abs().max() <= 1e-5


@every_family
def test_every_block_matters(family: str) -> None:
    model, token_ids = tiny_model(family), tiny_token_ids(1, 16)
    tensors, config = model.state_dict(), model.config.to_dict()
    whole = oracle_logits(tensors, config, token_ids)
    for index in range(model.config.num_hidden_layers):
        for kind in ("mha", "mlp"):
            assert (oracle_logits(tensors, config, token_ids, removed={(index, kind)}) - whole).abs().max() > 0.01


def test_a_window_changes_the_logits_only_beyond_it() -> None:
    narrow, wide, token_ids = tiny_model("mistral-window"), tiny_model("mistral"), tiny_token_ids(1, 12)
    difference = oracle_logits(narrow.state_dict(), narrow.config.to_dict(), token_ids) - oracle_logits(
        wide.state_dict(), wide.config.to_dict(), token_ids
    )
    changed_T = difference.abs().amax(dim=(0, 2)) > 1e-4
    assert changed_T.tolist() == [False] * 6 + [True] * 6


def test_nll_and_perplexity_by_hand() -> None:
    logits_BTV, token_ids_BT = (
        torch.randn(3, 9, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)),
        tiny_token_ids(3, 9),
    )
    nll_B = oracle_sequence_nll(logits_BTV, token_ids_BT)
    for logits_TV, token_ids_T, nll in zip(logits_BTV.double(), token_ids_BT, nll_B, strict=True):
        assert torch.isclose(functional.cross_entropy(logits_TV[:-1], token_ids_T[1:]), nll, rtol=1e-12)
    assert oracle_perplexity(nll_B) == pytest.approx(math.exp(sum(nll_B.tolist()) / 3), rel=1e-12)
    uniform = oracle_sequence_nll(torch.zeros(2, 5, 7), torch.zeros(2, 5, dtype=torch.int64))
    assert oracle_perplexity(uniform) == pytest.approx(7.0, rel=1e-12)


def test_models_and_oracles_cover_the_same_families() -> None:
    assert {tiny_model(family).config.model_type for family in TINY_FAMILIES} == set(ORACLES)


@every_family
def test_a_saved_model_loads_with_the_auto_classes(family: str, tiny_folder: Callable[[str], Path]) -> None:
    folder, text = tiny_folder(family), "\n\n".join(tiny_rows(3, seed=5))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    token_ids = tokenizer(text, return_tensors="pt").input_ids
    assert token_ids.tolist() == [tiny_tokenizer()(text).input_ids]
    assert token_ids[0, 0] == tokenizer.bos_token_id == 1
    assert tokenizer.decode(token_ids[0, 1:]) == text
    assert tokenizer(["a b", "a"], padding=True).input_ids[1][0] == tokenizer.pad_token_id == 0
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(model(input_ids=token_ids).logits, tiny_model(family)(input_ids=token_ids).logits)


def test_the_seed_decides_the_model() -> None:
    first, same, other = tiny_model(seed=1), tiny_model(seed=1), tiny_model(seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
