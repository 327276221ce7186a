"""The calibrate stage: from a text to an artifact's files, and what identifies it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blockpruner.calibration import TOKEN_FILE, load_token_ids
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import BlockPrunerError, ConfigurationError, TextSourceError
from blockpruner.progress import Progress
from stages.calibrate import STAGE, CalibrateConfig, CalibrateInputs, CalibrateManifest
from stages.contract import Runtime
from stages.text_sources import FileSource, TextSource, resolve_text
from tests.tiny_models import tiny_rows, tiny_tokenizer


@pytest.fixture
def tokenizer(tiny_folder: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint.open(str(tiny_folder("llama")))


@pytest.fixture
def text(tmp_path: Path) -> TextSource:
    path = tmp_path / "rows.txt"
    path.write_text("\n\n".join(tiny_rows(40)))
    return resolve_text(str(path), "calibration")


def calibrate(
    tokenizer: Checkpoint, text: TextSource, out_dir: Path, runtime: Runtime | None = None, **settings: Any
) -> CalibrateManifest:
    config = CalibrateConfig.model_validate({"source": text.source, "sequence_length": 16, **settings})
    out_dir.mkdir(exist_ok=True)
    return STAGE.run(config, CalibrateInputs(tokenizer, text), out_dir, runtime or Runtime())


def test_a_sample_is_the_references(tokenizer: Checkpoint, text: TextSource, tmp_path: Path) -> None:
    manifest = calibrate(tokenizer, text, tmp_path / "out", num_samples=9, seed=42)
    random.seed(42)
    chosen = [tiny_rows(40)[index] for index in random.sample(range(40), 9)]
    encoded = tiny_tokenizer()("\n\n".join(chosen), return_tensors="pt")["input_ids"][0]
    expected = encoded[: len(encoded) // 16 * 16].view(-1, 16)
    token_ids_BT = load_token_ids(tmp_path / "out")
    assert torch.equal(token_ids_BT, expected)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [TOKEN_FILE]
    assert manifest == CalibrateManifest(
        name="rows.txt",
        num_rows=9,
        num_sequences=len(expected),
        num_tokens=expected.numel(),
        sequence_length=16,
        token_digest=hashlib.sha256(str(list(expected.shape)).encode() + expected.numpy().tobytes()).hexdigest(),
    )


def test_no_sample_is_all_rows_in_order(tokenizer: Checkpoint, text: TextSource, tmp_path: Path) -> None:
    manifest = calibrate(tokenizer, text, tmp_path / "out")
    encoded = tiny_tokenizer()("\n\n".join(tiny_rows(40)), return_tensors="pt")["input_ids"][0]
    assert manifest.num_rows == 40
    assert load_token_ids(tmp_path / "out").flatten().tolist() == encoded[: manifest.num_tokens].tolist()
    assert len(encoded) - manifest.num_tokens < 16


def test_it_says_what_it_does(tokenizer: Checkpoint, text: TextSource, tmp_path: Path) -> None:
    heard: list[Progress] = []
    calibrate(tokenizer, text, tmp_path / "out", Runtime(progress=heard.append))
    assert [(report.done, report.total) for report in heard] == [(0, None), (40, 40)]


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"num_samples": 41, "seed": 42}, TextSourceError, "41 samples were asked for, the text has 40 rows"),
        (
            {"num_samples": 0, "seed": 42},
            ConfigurationError,
            "0 samples make no calibration set; give 1 or more, or all",
        ),
        ({"num_samples": -1, "seed": 42}, ConfigurationError, "-1 samples make no calibration set"),
        ({"num_samples": 5}, ConfigurationError, "a draw of samples needs a seed"),
        ({"sequence_length": 1}, ConfigurationError, "a sequence length of 1 leaves nothing to predict"),
        ({"sequence_length": 9999}, TextSourceError, "rows.txt: the text is too short: "),
    ],
)
def test_what_is_refused(
    tokenizer: Checkpoint,
    text: TextSource,
    tmp_path: Path,
    settings: dict[str, Any],
    error: type[BlockPrunerError],
    words: str,
) -> None:
    with pytest.raises(error) as caught:
        calibrate(tokenizer, text, tmp_path / "out", **settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_config_and_text_must_agree(tokenizer: Checkpoint, text: TextSource, tmp_path: Path) -> None:
    config = CalibrateConfig(source=FileSource(format="csv", column="text"), sequence_length=16)
    with pytest.raises(ValueError, match="take the config's from the text"):
        STAGE.run(config, CalibrateInputs(tokenizer, text), tmp_path, Runtime())


def test_identity(tokenizer: Checkpoint, text: TextSource, tmp_path: Path) -> None:
    def fingerprint(of: TextSource = text, **settings: int | None) -> str:
        config = CalibrateConfig.model_validate({"source": of.source, "sequence_length": 16, **settings})
        return STAGE.fingerprint(config, CalibrateInputs(tokenizer, of))

    assert text.file is not None
    copy = tmp_path / "elsewhere.txt"
    copy.write_bytes(text.file.read_bytes())
    changed = tmp_path / "changed.txt"
    changed.write_bytes(text.file.read_bytes() + b"\n")
    assert fingerprint(resolve_text(str(copy), "evaluation")) == fingerprint()
    assert fingerprint(resolve_text(str(changed), "evaluation")) != fingerprint()
    assert fingerprint(seed=1) == fingerprint(seed=2) == fingerprint()
    assert fingerprint(num_samples=5, seed=1) != fingerprint(num_samples=5, seed=2)
    assert fingerprint(sequence_length=17) != fingerprint()
    assert CalibrateConfig.model_validate_json(
        CalibrateConfig(source=text.source, sequence_length=16, num_samples=5, seed=1).model_dump_json()
    ).source == FileSource(format="txt")
