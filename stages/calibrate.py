"""Stage `calibrate`: token ids [num_sequences, sequence_length] from rows of text.

Makes the calibration set, and every evaluation text as well. Needs a tokenizer and no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import model_validator
from torch import Tensor

from blockpruner.calibration import cut_into_sequences, paper_sample, save_token_ids
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import ConfigurationError, TextSourceError
from blockpruner.loading import load_tokenizer
from blockpruner.progress import Progress
from stages.contract import Runtime, Stage, StageConfig, StageManifest
from stages.text_sources import AnySource, TextSource


class CalibrateConfig(StageConfig):
    """Which rows, and how they are cut."""

    source: AnySource
    """How the rows are read; the same as the input text's."""
    num_samples: int | None = None
    """Rows drawn at random as the paper draws them; None: all rows, in order."""
    sequence_length: int
    """Tokens of a sequence."""
    seed: int | None = None
    """Seed of the draw. Without a draw it does not matter, and is None here so that the identity does not hold it."""

    @model_validator(mode="before")
    @classmethod
    def _seed_belongs_to_a_draw(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("num_samples") is None:
            return {**fields, "seed": None}
        return fields


@dataclass(frozen=True)
class CalibrateInputs:
    """What this stage reads."""

    tokenizer: Checkpoint
    """The model folder whose tokenizer is used."""
    text: TextSource
    trust_remote_code: bool = False

    def fingerprints(self) -> Mapping[str, str]:
        """Tokenizer and text, by content."""
        return {"tokenizer": self.tokenizer.tokenizer_fingerprint, "text": self.text.fingerprint}


class CalibrateManifest(StageManifest):
    """What was made; the ids themselves are in tokens.safetensors."""

    name: str
    """What the text was called when this was made; another name for the same content finds the same artifact."""
    num_rows: int
    """Rows of text that were joined."""
    num_sequences: int
    num_tokens: int
    """Tokens in all sequences together: the dropped tail is not counted."""
    sequence_length: int
    token_digest: str
    """sha256 of shape and ids."""


def run(config: CalibrateConfig, inputs: CalibrateInputs, out_dir: Path, runtime: Runtime) -> CalibrateManifest:
    """Read, draw, join, tokenize, cut.

    Raises:
        TextSourceError: if the text cannot be read, has fewer rows than asked for, or is too short for one sequence.
        ConfigurationError: if a number is not valid.
    """
    if config.source != inputs.text.source:
        raise ValueError("config.source is not inputs.text.source: take the config's from the text")
    runtime.progress(Progress(0, None, "rows", f"reading {inputs.text.name}"))
    rows = choose_rows(inputs.text.rows, config.num_samples, config.seed)
    runtime.progress(Progress(len(rows), len(rows), "rows", f"tokenizing {inputs.text.name}"))
    tokenizer = load_tokenizer(inputs.tokenizer, trust_remote_code=inputs.trust_remote_code)
    try:
        token_ids_BT = cut_into_sequences(rows, tokenizer, config.sequence_length)
    except TextSourceError as error:
        raise TextSourceError(f"{inputs.text.name}: {error}") from error
    save_token_ids(token_ids_BT, out_dir)
    num_sequences, sequence_length = token_ids_BT.shape
    return CalibrateManifest(
        name=inputs.text.name,
        num_rows=len(rows),
        num_sequences=num_sequences,
        num_tokens=num_sequences * sequence_length,
        sequence_length=sequence_length,
        token_digest=token_digest(token_ids_BT),
    )


def choose_rows(rows: Sequence[str], num_samples: int | None, seed: int | None) -> Sequence[str]:
    """All rows in order, or a draw as the paper draws it.

    Raises:
        ConfigurationError: if the number is not positive, or the draw has no seed.
        TextSourceError: if there are fewer rows than that.
    """
    if num_samples is None:
        return rows
    if num_samples < 1:
        raise ConfigurationError(
            f"{num_samples} samples make no calibration set; give 1 or more, or all to take all rows in order"
        )
    if seed is None:
        raise ConfigurationError("a draw of samples needs a seed; give one (the paper's is 42)")
    return [rows[index] for index in paper_sample(len(rows), num_samples, seed)]


def token_digest(token_ids_BT: Tensor) -> str:
    """sha256 (hex) of shape and ids, whatever the machine's byte order."""
    content = token_ids_BT.contiguous().numpy().astype("<i8").tobytes()
    return hashlib.sha256(f"{list(token_ids_BT.shape)}".encode() + content).hexdigest()


STAGE: Stage[CalibrateConfig, CalibrateInputs, CalibrateManifest] = Stage(
    name="calibrate", version=1, manifest_type=CalibrateManifest, run=run
)
