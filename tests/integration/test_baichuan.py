"""Baichuan 2 7B, in its published layout at tiny size: folded, it answers as a forward written by hand does."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blockpruner.baichuan import check_fold, fold, is_foldable
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import CheckpointError, UnsupportedArchitectureError
from blockpruner.loading import check_tensors, load_model, meta_model
from flows.recipe import make_recipe
from flows.reporter import Reporter
from flows.runner import Runner
from stages.fold import FoldInputs
from tests.tiny_models import VOCAB_SIZE, tiny_rows, tiny_token_ids, tiny_tokenizer

HIDDEN, INTERMEDIATE, NUM_LAYERS, NUM_HEADS = 32, 48, 3, 4
CONFIG: dict[str, Any] = {
    "model_type": "baichuan",
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": NUM_HEADS,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "model_max_length": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "z_loss_weight": 0,
}


def random_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    def norm() -> Tensor:
        return torch.rand(HIDDEN, generator=generator) + 0.5

    tensors = {
        "model.embed_tokens.weight": matrix(VOCAB_SIZE, HIDDEN),
        "model.norm.weight": norm(),
        "lm_head.weight": 5 * matrix(VOCAB_SIZE, HIDDEN),
    }
    for index in range(NUM_LAYERS):
        layer = f"model.layers.{index}"
        tensors |= {
            f"{layer}.self_attn.W_pack.weight": matrix(3 * HIDDEN, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
            f"{layer}.self_attn.rotary_emb.inv_freq": torch.rand(HIDDEN // NUM_HEADS // 2, generator=generator),
            f"{layer}.mlp.gate_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{layer}.mlp.up_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            f"{layer}.mlp.down_proj.weight": matrix(HIDDEN, INTERMEDIATE),
            f"{layer}.input_layernorm.weight": norm(),
            f"{layer}.post_attention_layernorm.weight": norm(),
        }
    return tensors


def written(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    config = {name: value for name, value in {**CONFIG, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(), folder / "model.safetensors")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def forward_by_hand(tensors: Mapping[str, Tensor], ids_T: list[int]) -> Tensor:
    """The logits [T, V] of one sequence, from the published layout: packed attention, normalised head."""
    x = tensors["model.embed_tokens.weight"][ids_T]
    size, num_tokens = HIDDEN // NUM_HEADS, len(ids_T)
    for index in range(NUM_LAYERS):
        at = f"model.layers.{index}."
        h = rms(x, tensors[at + "input_layernorm.weight"])
        q, k, v = (h @ part.T for part in tensors[at + "self_attn.W_pack.weight"].split(HIDDEN))
        heads = []
        for head in range(NUM_HEADS):
            mine = slice(head * size, (head + 1) * size)
            scores = rotated(q[:, mine]) @ rotated(k[:, mine]).T / math.sqrt(size)
            scores = scores.masked_fill(torch.ones(num_tokens, num_tokens).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v[:, mine])
        x = x + torch.cat(heads, -1) @ tensors[at + "self_attn.o_proj.weight"].T
        h = rms(x, tensors[at + "post_attention_layernorm.weight"])
        gate, up = h @ tensors[at + "mlp.gate_proj.weight"].T, h @ tensors[at + "mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ tensors[at + "mlp.down_proj.weight"].T
    head_VD = tensors["lm_head.weight"]
    head_VD = head_VD / (head_VD * head_VD).sum(-1, keepdim=True).sqrt()
    return rms(x, tensors["model.norm.weight"]) @ head_VD.T


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / ((x * x).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(x_TH: Tensor) -> Tensor:
    half = x_TH.shape[1] // 2
    angles = torch.arange(len(x_TH))[:, None] * 10000.0 ** (-torch.arange(half) / half)
    a, b = x_TH[:, :half], x_TH[:, half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


@pytest.mark.parametrize("shard_bytes", [2**30, 20_000])
def test_the_folded_model_answers_as_the_forward_by_hand(tmp_path: Path, shard_bytes: int) -> None:
    checkpoint = Checkpoint.open(str(written(tmp_path / "baichuan")))
    assert is_foldable(checkpoint)
    fold(checkpoint, tmp_path / "llama", shard_bytes=shard_bytes)
    folded = Checkpoint.open(str(tmp_path / "llama"))
    assert folded.model_type == "llama"
    assert (len(list((tmp_path / "llama").glob("*.safetensors"))) > 1) == (shard_bytes == 20_000)
    model = load_model(folded, device="cpu", dtype="float32")
    token_ids_BT = tiny_token_ids(2, 20, seed=5)
    logits_BTV = model(input_ids=token_ids_BT).logits
    for row, ids_T in enumerate(token_ids_BT.tolist()):
        expected_TV = forward_by_hand(random_tensors(), ids_T)
        assert (logits_BTV[row] - expected_TV).abs().max() <= 1e-5
    head = load_file(tmp_path / "llama" / folded.tensors["lm_head.weight"].file.name)["lm_head.weight"]
    torch.testing.assert_close(head.norm(dim=-1), torch.ones(VOCAB_SIZE))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenization_mine.py", "open('mark', 'w')"),
        ("evil.safetensors.py", "open('mark', 'w')"),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", null]}}'),
        ("config.json", json.dumps({**CONFIG, "auto_map": {"AutoConfig": "tokenization_mine.Mine"}})),
        ("config.json", "[" * 200_000),
        ("more/tokenization_mine.py", "open('mark', 'w')"),
    ],
)
def test_a_fold_that_others_have_added_to_is_noticed(tmp_path: Path, name: str, content: str) -> None:
    source, folder = Checkpoint.open(str(written(tmp_path / "baichuan"))), tmp_path / "fold" / "model"
    fold(source, folder, shard_bytes=4000)
    check_fold(source, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{name.split('/')[0]}.* is another file"):
        check_fold(source, folder)


def test_a_fold_is_made_anew_when_the_tokenizer_has_changed(tmp_path: Path) -> None:
    path = written(tmp_path / "baichuan")
    before = FoldInputs(Checkpoint.open(str(path))).fingerprints()
    assert FoldInputs(Checkpoint.open(str(path))).fingerprints() == before
    (path / "tokenizer_config.json").write_text("{}")
    assert FoldInputs(Checkpoint.open(str(path))).fingerprints() != before


def test_a_search_and_an_export_of_the_published_layout(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(tiny_rows(60)))
    recipe = make_recipe(
        {
            "model": str(written(tmp_path / "baichuan")),
            "calibration": str(text),
            "num_samples": "all",
            "sequence_length": 32,
            "num_blocks": 2,
        }
    )
    record = Runner(tmp_path / "workspace", Reporter()).run(recipe, "export")
    assert record.status == "completed"
    assert [stage.stage for stage in record.stages] == ["fold", "calibrate", "search", "export"]
    assert record.num_layers == NUM_LAYERS
    again = Runner(tmp_path / "workspace", Reporter()).run(recipe, "export")
    assert all(stage.cached for stage in again.stages)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"max_position_embeddings": None}, "ALiBi"), ({"z_loss_weight": None}, "first generation")],
)
def test_other_baichuans_are_refused_with_the_reason(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    checkpoint = Checkpoint.open(str(written(tmp_path / "other", **changes)))
    with pytest.raises(UnsupportedArchitectureError, match=reason) as caught:
        meta_model(checkpoint)
    assert "\n" not in str(caught.value)
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        fold(checkpoint, tmp_path / "out")


def test_tensors_of_another_shape_are_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(written(tmp_path / "baichuan", hidden_size=40)))
    with pytest.raises(CheckpointError, match=r"W_pack.*\[120, 40\]"):
        check_tensors(checkpoint, meta_model(checkpoint)[1])
