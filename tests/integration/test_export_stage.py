"""The export stage: what it says must be true, and an export that computes something else must not count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import stages.export
from blockpruner.architectures import architecture_of, block_sizes, num_parameters
from blockpruner.blocks import Block, all_blocks, mha, mlp
from blockpruner.errors import ConfigurationError, ExportError
from blockpruner.export.verify import Loading, Verification, masked_logits
from blockpruner.export.write import WrittenExport, write_export
from blockpruner.loading import load_model, meta_model
from blockpruner.progress import Progress
from stages.contract import ArtifactRef, Runtime
from stages.export import MODEL_FOLDER, STAGE, ExportConfig, ExportInputs, ExportManifest
from tests.integration.export_lab import every_family, finished_search, load, run, verify_here
from tests.oracles import oracle_logits
from tests.tiny_models import tiny_model, tiny_token_ids

TinyFolder = Callable[[str], Path]
ORDER = (mlp(1), mha(2), mha(0))
"""Stock after two removals, custom after one and three."""


@pytest.fixture
def inputs(tiny_folder: TinyFolder, tmp_path: Path) -> ExportInputs:
    """A Llama with tied embeddings, and a finished search over it."""
    return finished_search(tiny_folder("llama-bias-tied"), ORDER, tmp_path)


def passes(*_: object, **__: object) -> Verification:
    """In place of a fresh process, where the test is not about the gate."""
    return Verification(0.0, 1e-5)


def not_this_far(*_: object, **__: object) -> NoReturn:
    raise AssertionError("a model was loaded")


def check_manifest(manifest: ExportManifest, num_blocks: int) -> None:
    dense = tiny_model("llama-bias-tied")
    sizes = block_sizes(architecture_of("llama"), dense)
    dropped = ORDER[:num_blocks]
    assert manifest.dropped == dropped
    assert manifest.kept == tuple(block for block in all_blocks(4) if block not in dropped)
    assert manifest.num_blocks_removed == num_blocks
    assert manifest.num_parameters == num_parameters(dense) - sum(sizes[block] for block in dropped)


def test_a_stock_export_is_written_verified_and_described(tmp_path: Path, inputs: ExportInputs) -> None:
    reports: list[Progress] = []
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    manifest = STAGE.run(ExportConfig(num_blocks=2), inputs, out_dir, Runtime(progress=reports.append))
    check_manifest(manifest, 2)
    model_dir = out_dir / MODEL_FOLDER
    assert manifest.format == "stock"
    assert manifest.verified is True
    assert 0.0 <= manifest.max_logit_difference <= 1e-5
    assert manifest.bytes == sum(file.stat().st_size for file in model_dir.iterdir())
    assert STAGE.manifest_type.model_validate_json(manifest.model_dump_json()) == manifest
    assert (reports[-1].done, reports[-1].total) == (2, 2)
    card = (model_dir / "README.md").read_text()
    assert "| perplexity on the calibration set | 10.000 | 12.000 |" in card
    assert f"{manifest.num_parameters:,} of " in card
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    ids = tiny_token_ids(2, 10)
    dense = tiny_model("llama-bias-tied")
    gone = {(block.layer_index, block.block_kind.value) for block in ORDER[:2]}
    expected = oracle_logits(dense.state_dict(), dense.config.to_dict(), ids, gone)
    assert (model(input_ids=ids).logits - expected).abs().max() <= 1e-5
    assert AutoTokenizer.from_pretrained(model_dir).decode([1]) == "<s>"


@pytest.mark.parametrize(
    ("num_blocks", "format_"), [(1, "transformers"), (2, "stock"), (3, "transformers"), (None, "transformers")]
)
def test_as_many_blocks_go_as_asked_for(
    tmp_path: Path, inputs: ExportInputs, monkeypatch: pytest.MonkeyPatch, num_blocks: int | None, format_: str
) -> None:
    monkeypatch.setattr(stages.export, "verify_export", passes)
    manifest = run(tmp_path, inputs, num_blocks=num_blocks)
    check_manifest(manifest, num_blocks or 3)
    assert manifest.format == format_
    card = (tmp_path / "out" / MODEL_FOLDER / "README.md").read_text()
    assert f"| perplexity on the calibration set | 10.000 | {10 + (num_blocks or 3)}.000 |" in card
    assert ("trust_remote_code=True" in card) == (format_ == "transformers")


@pytest.mark.parametrize("num_blocks", [0, -1, 4, 100])
def test_more_blocks_than_were_searched_are_refused_before_anything_is_written(
    tmp_path: Path, inputs: ExportInputs, num_blocks: int
) -> None:
    with pytest.raises(ConfigurationError, match="1 to 3") as caught:
        run(tmp_path, inputs, num_blocks=num_blocks)
    assert str(num_blocks) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_stock_that_cannot_be_is_refused_before_a_model_is_loaded(
    tmp_path: Path, inputs: ExportInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.export, "load_model", not_this_far)
    with pytest.raises(ExportError, match="format stock") as caught:
        run(tmp_path, inputs, num_blocks=3, format="stock")
    assert len(str(caught.value).splitlines()) == 1


def test_an_export_with_another_weight_does_not_count(
    tmp_path: Path, inputs: ExportInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One weight of one block is off, and the fresh process sees it."""

    def spoil(*arguments: Any, **options: Any) -> WrittenExport:
        written = write_export(*arguments, **options)
        path = written.path / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.1.mlps.0.mlp.up_proj.weight"][0, 0] += 0.02
        save_file(tensors, path, {"format": "pt"})
        return written

    monkeypatch.setattr(stages.export, "write_export", spoil)
    with pytest.raises(ExportError, match="differs from the masked original") as caught:
        run(tmp_path, inputs, num_blocks=3)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("wrong", [(mlp(1),), (mlp(1), mha(3), mha(0)), (mlp(1), mha(2), mha(0), mha(1))], ids=str)
def test_an_export_of_other_blocks_does_not_count(
    tmp_path: Path, inputs: ExportInputs, monkeypatch: pytest.MonkeyPatch, wrong: tuple[Block, ...]
) -> None:
    """The answer of the fresh process is that of the masked original without the wrong blocks."""

    def answer(export_dir: Path, request: dict[str, torch.Tensor], loading: Loading) -> dict[str, torch.Tensor]:
        model = load_model(inputs.model, device=loading.device, dtype="float32")
        architecture, _ = meta_model(inputs.model)
        return masked_logits(architecture, model, wrong, request)

    monkeypatch.setattr("blockpruner.export.verify._ask_fresh_process", answer)
    with pytest.raises(ExportError, match="differs from the masked original"):
        run(tmp_path, inputs, num_blocks=3)


def test_logits_that_are_not_numbers_do_not_count(
    tmp_path: Path, inputs: ExportInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.export, "verify_export", lambda *_, **__: Verification(float("nan"), 1e-5))
    with pytest.raises(ExportError, match="nan"):
        run(tmp_path, inputs, num_blocks=3)


def test_what_changes_the_result_changes_the_fingerprint(inputs: ExportInputs, tmp_path: Path) -> None:
    mine = STAGE.fingerprint(ExportConfig(num_blocks=2), inputs)
    same = ExportInputs(inputs.model, ArtifactRef(inputs.search.fingerprint, tmp_path))
    other = ExportInputs(inputs.model, ArtifactRef("6" * 64, inputs.search.path))
    assert STAGE.fingerprint(ExportConfig(num_blocks=2), same) == mine
    assert STAGE.fingerprint(ExportConfig(num_blocks=2), other) != mine
    assert STAGE.fingerprint(ExportConfig(num_blocks=3), inputs) != mine
    assert STAGE.fingerprint(ExportConfig(num_blocks=2, format="transformers"), inputs) != mine


def test_weights_can_be_written_in_another_dtype(inputs: ExportInputs, tmp_path: Path) -> None:
    """Compared with the original's weights, rounded likewise."""
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        (folder := tmp_path / dtype).mkdir()
        manifest = run(folder, inputs, dtype=dtype)
        assert manifest.verified
        assert manifest.verified_with == "transformers"
        sizes[dtype] = (folder / "out" / "model" / "model.safetensors").stat().st_size
    assert sizes["bfloat16"] < 0.6 * sizes["float32"]


@every_family
def test_weights_of_every_family_can_be_rounded(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Weights alone: what a family computes from its configuration, such as Gemma's scale of embeddings, is not."""
    verify_here(monkeypatch)
    manifest = run(tmp_path, finished_search(tiny_folder(family), ORDER[:2], tmp_path), dtype="bfloat16")
    assert manifest.verified
    model = load(tmp_path / "out" / MODEL_FOLDER, dtype="auto")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "q8_0"])
def test_a_gguf_file_is_verified_with_what_is_there(
    inputs: ExportInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr("blockpruner.export.gguf_file.verification.find_spec", lambda _: None)
    manifest = run(tmp_path, inputs, format="gguf", dtype=dtype)
    check_manifest(manifest, 3)
    assert (manifest.format, manifest.verified_with) == ("gguf", "reader")
    assert 0.0 <= manifest.max_logit_difference <= 1e-4
    model_dir = tmp_path / "out" / MODEL_FOLDER
    assert {file.name for file in model_dir.iterdir()} == {"README.md", "model.gguf", "pruning_manifest.json"}
    assert "llama-cli -m model.gguf" in (model_dir / "README.md").read_text()


@pytest.mark.parametrize("where", [-4, -2000, 0.6])
def test_a_gguf_file_with_another_weight_does_not_count(
    inputs: ExportInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: float
) -> None:
    """The last bytes are weights, all of them read."""

    def spoil(*arguments: Any, **options: Any) -> WrittenExport:
        written = write_export(*arguments, **options)
        content = bytearray((written.path / "model.gguf").read_bytes())
        start = int(where * len(content)) if isinstance(where, float) else where
        start = start % len(content) // 4 * 4
        content[start : start + 4] = b"\x00\x00\x80\x3f"  # 1.0
        (written.path / "model.gguf").write_bytes(content)
        return written

    monkeypatch.setattr(stages.export, "write_export", spoil)
    with pytest.raises(ExportError, match="differs from the masked original") as caught:
        run(tmp_path, inputs, num_blocks=2, format="gguf")
    assert "with reader" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_what_llama_cpp_does_not_load_does_not_count(
    inputs: ExportInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever our own reader says."""
    (program := tmp_path / "program.py").write_text("import sys; sys.exit('GGML_ASSERT(x) failed')")
    monkeypatch.setattr("blockpruner.export.gguf_file.verification.find_spec", lambda _: "installed")
    monkeypatch.setattr("blockpruner.export.gguf_file.verification._PROGRAM", program)
    with pytest.raises(ExportError, match=r"with llama.cpp the export cannot be loaded.*GGML_ASSERT\(x\) failed"):
        run(tmp_path, inputs, num_blocks=2, format="gguf")
