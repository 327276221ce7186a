"""Stage `baseline`: the unpruned model's perplexity on the calibration set and on every evaluation text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from blockpruner.checkpoint import Checkpoint
from blockpruner.loading import DtypeName, load_model
from stages.contract import ArtifactRef, Runtime, Stage, StageConfig, StageManifest
from stages.text_perplexity import NamedTokens, TextPerplexity, text_fingerprints, text_perplexities

CALIBRATION = "calibration"
"""The name under which the calibration set is listed among the texts."""


class BaselineConfig(StageConfig):
    """How to compute."""

    dtype: DtypeName = "float32"
    """Dtype of weights and activations."""


@dataclass(frozen=True)
class BaselineInputs:
    """What this stage reads."""

    model: Checkpoint
    calibration: ArtifactRef
    texts: NamedTokens = ()
    """Evaluation texts by name."""
    trust_remote_code: bool = False

    def fingerprints(self) -> Mapping[str, str]:
        """Model, calibration set and texts, by content; the names are part of the result, hence of its identity."""
        return {
            "model": self.model.fingerprint,
            CALIBRATION: self.calibration.fingerprint,
            **text_fingerprints(self.texts),
        }


class BaselineManifest(StageManifest):
    """Dense perplexities; the calibration set's comes first, under the name 'calibration'."""

    texts: tuple[TextPerplexity, ...]


def run(config: BaselineConfig, inputs: BaselineInputs, out_dir: Path, runtime: Runtime) -> BaselineManifest:
    """Load the model once and measure every text.

    A text's perplexity is exp of the mean over sequences of each sequence's mean token NLL: the paper's own measure
    (Zhong et al., BlockPruner, Findings of ACL 2025, section 3.2), which on sequences of one length is the usual one.
    Nothing is written to `out_dir`: the manifest is the result.
    """
    model = load_model(
        inputs.model, device=runtime.device, dtype=config.dtype, trust_remote_code=inputs.trust_remote_code
    )
    texts = ((CALIBRATION, inputs.calibration), *inputs.texts)
    return BaselineManifest(texts=text_perplexities(model, texts, runtime))


STAGE: Stage[BaselineConfig, BaselineInputs, BaselineManifest] = Stage(
    name="baseline", version=1, manifest_type=BaselineManifest, run=run
)
