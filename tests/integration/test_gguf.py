"""Format gguf: what a reader that shares no code with the writer finds in the file computes what the original does.

The reader does what llama.cpp does; `test_gguf_engine` has llama.cpp itself say so.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Regex, normalizers, pre_tokenizers
from torch import Tensor

from blockpruner.blocks import Block, all_blocks, mha, mlp
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import ExportError
from blockpruner.export.formats import FORMATS
from blockpruner.export.gguf_file import plan, tensors, verification
from blockpruner.export.gguf_file.format import MODEL_FILE
from blockpruner.export.gguf_file.layers import FileLayer, file_layers
from blockpruner.export.gguf_file.reader import GgufModel
from blockpruner.export.names import ExportDtype
from blockpruner.export.verify import compare
from blockpruner.export.write import write_export
from flows.plan import Plan
from flows.recipe import make_recipe
from tests.integration.export_lab import REQUEST, Source, TinyFolder
from tests.integration.gguf_lab import (
    CASES,
    CUTS,
    CUTTERS,
    TOKENIZERS,
    byte_level,
    is_held,
    make_source,
    with_tokenizer,
    word_starts,
)
from tests.tiny_models import save_tiny_model, tiny_rows


@pytest.fixture(scope="module")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    root = tmp_path_factory.mktemp("gguf-sources")
    return functools.cache(lambda shape: make_source(root, shape))


def read(path: Path) -> dict[str, Tensor]:
    return verification.answer(GgufModel(path / MODEL_FILE), REQUEST)


def settings(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path / MODEL_FILE).fields.items()}


# --- the same logits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "cut"), CASES)
def test_the_file_computes_what_the_masked_original_does(
    source_of: Callable[[str], Source], tmp_path: Path, shape: str, cut: str
) -> None:
    """Or the format is refused, with the reason and the formats that can, and nothing is written."""
    source, removed = source_of(shape), CUTS[cut]
    if not is_held(shape, cut):
        with pytest.raises(ExportError, match=r"alternate.*--format") as caught:
            write_export(source.checkpoint, removed, tmp_path / "model", "gguf")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "model").exists()
        return
    write_export(source.checkpoint, removed, tmp_path / "model", "gguf")
    expected, answer = source.masked_logits(removed), read(tmp_path / "model")
    assert compare(answer, expected, "float32").max_logit_difference <= 2e-5
    if "positions" not in shape:  # scaled ones are not written out by hand
        alone = source.oracle_logits(removed, REQUEST["plain_ids"])
        assert (answer["plain_logits"] - alone).abs().max() <= 3e-5


@pytest.mark.parametrize("dtype", get_args(ExportDtype))
@pytest.mark.parametrize("cut", ["alternating", "first attention", "attentions in a row"])
def test_rounded_weights_are_those_of_the_original_rounded_likewise(
    tmp_path: Path, cut: str, dtype: ExportDtype
) -> None:
    source = Source.of(save_tiny_model(tmp_path / "source", "llama", head_dim=32, intermediate_size=96))
    dense = source.masked_logits(CUTS[cut])
    write_export(source.checkpoint, CUTS[cut], tmp_path / "model", "gguf", dtype=dtype)
    FORMATS["gguf"].coarsen(source.model, tmp_path / "model", None)
    expected = source.masked_logits(CUTS[cut])
    assert compare(read(tmp_path / "model"), expected, "float32").max_logit_difference <= 2e-5
    lost = compare(expected, dense, "float32").max_logit_difference
    assert (lost == 0.0) == (dtype == "float32")
    bits = {"float32": 32.0, "float16": 16.0, "bfloat16": 16.0, "q8_0": 8.5}[dtype]
    matrices = [found for found in GGUFReader(tmp_path / "model" / MODEL_FILE).tensors if len(found.shape) == 2]
    assert sum(int(found.n_bytes) for found in matrices) * 8 == bits * sum(int(found.n_elements) for found in matrices)


def test_rows_that_q8_0_cannot_cut_are_half_precision(source_of: Callable[[str], Source], tmp_path: Path) -> None:
    """48 values are no multiple of 32."""
    write_export(source_of("llama").checkpoint, (), tmp_path / "model", "gguf", dtype="q8_0")
    kinds = {found.name: found.tensor_type.name for found in GGUFReader(tmp_path / "model" / MODEL_FILE).tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}


def test_weights_stay_as_they_are_unless_asked_for(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "source", "llama")
    Source.of(folder).model.to(torch.bfloat16).save_pretrained(folder)
    write_export(Checkpoint.open(str(folder)), (mha(0),), tmp_path / "model", "gguf")
    kinds = {found.tensor_type.name for found in GGUFReader(tmp_path / "model" / MODEL_FILE).tensors}
    assert kinds == {"F32", "BF16"}


# --- layers and stand-ins ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        ((mha(0),), [(None, 0), (1, 1)]),
        ((mlp(0),), [(0, None), (1, 1)]),
        ((mlp(0), mha(1)), [(0, 1)]),
        ((mha(1),), [(0, 0), (None, 1)]),
        ((mlp(1),), [(0, 0), (1, None)]),
        ((mha(0), mha(1)), [(None, 0), (None, 1)]),
    ],
    ids=str,
)
def test_a_layer_takes_the_block_that_comes_next(
    removed: tuple[Block, ...], expected: list[tuple[int | None, int | None]]
) -> None:
    kept = [block for block in all_blocks(2) if block not in removed]
    layers = file_layers(sorted(kept, key=lambda block: (block.layer_index, block.block_kind.value)))
    assert layers == tuple(FileLayer(*layer) for layer in expected)


def test_no_feed_forward_block_is_zero_wide_and_the_first_layer_has_heads(
    source_of: Callable[[str], Source], tmp_path: Path
) -> None:
    """llama.cpp drops the attention of the one, and does not load the other."""
    removed = (mha(0), mlp(1), mha(3), mlp(2))
    write_export(source_of("llama").checkpoint, removed, tmp_path / "model", "gguf")
    found = settings(tmp_path / "model")
    assert found["general.architecture"] == "deci"
    assert found["deci.feed_forward_length"] == [48, 32, 48]
    assert found["deci.attention.head_count"] == [1, 4, 4]
    assert found["deci.attention.head_count_kv"] == [1, 2, 2]
    assert (found["deci.attention.key_length"], found["deci.rope.dimension_count"]) == (8, 8)


@pytest.mark.parametrize(
    ("width", "expected"), [(48, 32), (688, 32), (1024, 32), (2048, 256), (11008, 256), (6912, 256)]
)
def test_stand_ins_are_small_and_can_be_quantized_as_the_rest(width: int, expected: int) -> None:
    assert plan.stand_in_width(width) == expected


def test_the_gate_knows_what_llama_cpp_makes_of_a_zero_wide_block(
    source_of: Callable[[str], Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "stand_in_width", lambda _: 0)
    monkeypatch.setattr(tensors, "_stand_ins", lambda _: iter(()))
    source = source_of("llama")
    write_export(source.checkpoint, (mlp(1),), tmp_path / "model", "gguf")
    difference = compare(read(tmp_path / "model"), source.masked_logits((mlp(1),)), "float32")
    assert not difference.passed
    both = source.masked_logits((mlp(1), mha(1)))
    assert compare(read(tmp_path / "model"), both, "float32").max_logit_difference <= 2e-5


def test_memory_holds_one_tensor_at_a_time(
    source_of: Callable[[str], Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blockpruner.export import weights

    alive: list[weakref.ref[Tensor]] = []
    original = weights.read_tensor

    def watched(checkpoint: Checkpoint, name: str) -> Tensor:
        assert not [ref for ref in alive if ref() is not None], name
        tensor = original(checkpoint, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(weights, "read_tensor", watched)
    write_export(source_of("llama").checkpoint, (mha(0),), tmp_path / "model", "gguf")
    assert len(alive) > 20


# --- what it cannot hold ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("gpt2", {}, "and this is a gpt2"),
        ("mixtral", {}, "and this is a mixtral"),
        ("mistral-window", {}, "the context would end at this model's window of 6 tokens"),
        ("qwen2-mixed-windows", {}, "window of 6 tokens"),
        ("gemma2", {"tie_word_embeddings": True}, "scores scaled by 24"),
        ("gemma2", {"query_pre_attn_scalar": 16}, "an output head of its own"),
        ("llama", {"hidden_act": "gelu"}, "the activation 'gelu'"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "type 'yarn'"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, family: str, overrides: dict[str, Any], reason: str
) -> None:
    checkpoint = Checkpoint.open(str(save_tiny_model(tmp_path / "source", family, **overrides)))
    with pytest.raises(ExportError, match=reason) as caught:
        write_export(checkpoint, (mlp(1), mha(2)), tmp_path / "model", "gguf")
    assert "what can hold it: --format " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "source", "llama")
    for file in folder.glob("token*"):
        file.unlink()
    with pytest.raises(ExportError, match="tokenizer") as caught:
        write_export(Checkpoint.open(str(folder)), (mha(0),), tmp_path / "model", "gguf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float16", "q8_0"])
@pytest.mark.parametrize("wanted", ["auto", "stock", "transformers"])
def test_dtypes_that_only_gguf_has_are_refused_elsewhere(
    source_of: Callable[[str], Source], tmp_path: Path, wanted: Any, dtype: ExportDtype
) -> None:
    removed = CUTS["alternating"]
    with pytest.raises(ExportError, match=f"has no dtype {dtype}.*--format gguf"):
        write_export(source_of("llama").checkpoint, removed, tmp_path / "model", wanted, dtype=dtype)


# --- the tokenizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_tokenizer_is_in_the_file(tmp_path: Path, kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    source = with_tokenizer(tmp_path / "source", tokenizer)
    write_export(source.checkpoint, (mha(0),), tmp_path / "model", "gguf")
    found = {name.removeprefix("tokenizer."): value for name, value in settings(tmp_path / "model").items()}
    assert found["chat_template"] == tokenizer.chat_template
    tokens = found["ggml.tokens"]
    assert tokens[:-3] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert found["ggml.token_type"][-3:] == [5, 5, 5]
    assert (found["ggml.bos_token_id"], found["ggml.add_bos_token"]) == (1, True)
    assert found["ggml.add_eos_token"] is False
    if kind in CUTTERS:
        assert (found["ggml.model"], found["ggml.pre"]) == ("gpt2", CUTTERS[kind][0])
        assert len(found["ggml.merges"]) > 50
    else:
        assert (found["ggml.model"], found["ggml.pre"]) == ("llama", "default")
        assert found["ggml.add_space_prefix"] == (kind == "Llama 2")
        assert [found["ggml.token_type"][number] for number in (0, 1, 3)] == [2, 3, 6]


def test_a_tokenizer_that_cuts_text_in_its_own_way_is_refused(tmp_path: Path) -> None:
    cutter = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)])
    source = with_tokenizer(tmp_path / "source", byte_level(cutter))
    with pytest.raises(ExportError, match=r"cuts text into words.*--format"):
        write_export(source.checkpoint, (mha(0),), tmp_path / "model", "gguf")


def test_spaces_that_llama_cpp_keeps_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As SentencePiece's `remove_extra_whitespaces` is in a tokenizer.json."""
    drops = [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(r" {2,}"), " ")]
    source = with_tokenizer(tmp_path / "source", word_starts(*drops))
    write_export(source.checkpoint, (mha(0),), tmp_path / "model", "gguf")
    assert settings(tmp_path / "model")["tokenizer.ggml.remove_extra_whitespaces"] is True
    assert "doubled ones, and llama.cpp does not" in caplog.text


@pytest.mark.parametrize("step", [normalizers.Lowercase(), normalizers.NFKC(), normalizers.Replace("a", "b")], ids=str)
def test_text_that_llama_cpp_would_not_change_likewise_is_refused(tmp_path: Path, step: Any) -> None:
    source = with_tokenizer(tmp_path / "source", word_starts(step))
    with pytest.raises(ExportError, match="normalises text by a step"):
        write_export(source.checkpoint, (mha(0),), tmp_path / "model", "gguf")


# --- what is measured here --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formats", "exports"),
    [
        ("gguf", ["export", "export as gguf"]),
        ("gguf,zeroed", ["export", "export as gguf"]),
        ("auto,gguf", ["export", "export as gguf"]),
    ],
)
def test_what_is_evaluated_is_never_a_gguf_file(
    tiny_folder: TinyFolder, tmp_path: Path, formats: str, exports: list[str]
) -> None:
    (rows := tmp_path / "rows.txt").write_text("\n".join(tiny_rows(40)))
    recipe = make_recipe(
        {
            "model": str(tiny_folder("llama")),
            "calibration": str(rows),
            "num_blocks": 2,
            "sequence_length": 16,
            "export_format": formats,
        }
    )
    for goal in ("evaluate", "speed"):
        labels = [stage.label for stage in Plan.make(recipe, goal).stages]
        assert [label for label in labels if label.startswith("export")] == exports
    alone = [stage.role for stage in Plan.make(recipe, "export").stages if "export" in stage.role]
    assert len(alone) == len(formats.split(","))
