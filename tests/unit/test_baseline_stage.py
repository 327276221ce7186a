"""The baseline stage: dense perplexities against a forward pass written out by hand."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from blockpruner.calibration import save_token_ids
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import ConfigurationError
from blockpruner.progress import Progress
from stages.baseline import STAGE, BaselineConfig, BaselineInputs
from stages.contract import ArtifactRef, Runtime
from tests.oracles import oracle_logits, oracle_sequence_nll
from tests.tiny_models import tiny_token_ids


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[[str, Tensor], ArtifactRef]:
    def artifact(name: str, token_ids_BT: Tensor) -> ArtifactRef:
        folder = tmp_path / name
        folder.mkdir()
        save_token_ids(token_ids_BT, folder)
        return ArtifactRef(fingerprint=name, path=folder)

    return artifact


def test_predictions_that_are_not_finite_are_said(
    tiny_folder: Callable[[str], Path],
    prepare: Callable[[str, Tensor], ArtifactRef],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copytree(tiny_folder("qwen2"), tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["model.embed_tokens.weight"][7] = math.nan
    save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    token_ids_BT = tiny_token_ids(3, 12)
    token_ids_BT[token_ids_BT == 7] = 8
    token_ids_BT[1, 4] = 7
    inputs = BaselineInputs(Checkpoint.open(str(tmp_path / "model")), prepare("calibration", token_ids_BT))
    manifest = STAGE.run(BaselineConfig(), inputs, tmp_path, Runtime())
    assert math.isnan(manifest.texts[0].perplexity)
    assert "not finite on 1 of the 3 sequences of 'calibration': its perplexity is nan" in caplog.text


def test_perplexities_are_the_oracles(
    tiny_folder: Callable[[str], Path], prepare: Callable[[str, Tensor], ArtifactRef], tmp_path: Path
) -> None:
    folder = tiny_folder("qwen2")
    ids = {"calibration": tiny_token_ids(5, 12), "plays": tiny_token_ids(3, 20, seed=1), "news": tiny_token_ids(2, 9)}
    refs = {name: prepare(name, token_ids_BT) for name, token_ids_BT in ids.items()}
    inputs = BaselineInputs(
        Checkpoint.open(str(folder)), refs["calibration"], (("plays", refs["plays"]), ("news", refs["news"]))
    )
    heard: list[Progress] = []
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    manifest = STAGE.run(BaselineConfig(), inputs, out_dir, Runtime(batch_size=2, progress=heard.append))

    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    assert [text.text for text in manifest.texts] == list(ids)
    for text in manifest.texts:
        nll_B = oracle_sequence_nll(oracle_logits(tensors, config, ids[text.text]), ids[text.text])
        assert text.perplexity == pytest.approx(math.exp(float(nll_B.mean())), rel=1e-5)
        assert text.num_tokens == ids[text.text].numel()
    assert [(report.done, report.total, report.note) for report in heard] == [
        *[(done, 10, "calibration") for done in (2, 4, 5)],
        *[(done, 10, "plays") for done in (7, 8)],
        (10, 10, "news"),
    ]


def test_a_text_of_another_tokenizer(
    tiny_folder: Callable[[str], Path], prepare: Callable[[str, Tensor], ArtifactRef], tmp_path: Path
) -> None:
    ref = prepare("foreign", tiny_token_ids(2, 8) + 100)
    inputs = BaselineInputs(Checkpoint.open(str(tiny_folder("llama"))), ref)
    with pytest.raises(ConfigurationError, match=r"'calibration' holds token id \d+, the model knows 128 tokens"):
        STAGE.run(BaselineConfig(), inputs, tmp_path, Runtime())


def test_identity(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = Checkpoint.open(str(tiny_folder("llama")))

    def fingerprint(*texts: tuple[str, str], calibration: str = "c") -> str:
        refs = tuple((name, ArtifactRef(digest, tmp_path)) for name, digest in texts)
        return STAGE.fingerprint(BaselineConfig(), BaselineInputs(model, ArtifactRef(calibration, tmp_path), refs))

    assert fingerprint(("a", "1"), ("b", "2")) == fingerprint(("a", "1"), ("b", "2"))
    others = [fingerprint(("b", "1"), ("a", "2")), fingerprint(("a", "1")), fingerprint(calibration="d"), fingerprint()]
    assert len({fingerprint(("a", "1"), ("b", "2")), *others}) == 5
