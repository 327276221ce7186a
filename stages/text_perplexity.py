"""A model's perplexity on prepared texts, one after the other: what `baseline` and `evaluate` share.

And `search` its check of the vocabulary. Not a stage.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.calibration import load_token_ids
from blockpruner.errors import ConfigurationError
from blockpruner.perplexity import perplexity, sequence_nll
from blockpruner.progress import Progress
from stages.contract import ArtifactRef, Runtime, StageManifest

logger = logging.getLogger(__name__)

NamedTokens = Sequence[tuple[str, ArtifactRef]]
"""Texts by the name they are reported under, each with the artifact of `calibrate` that holds its token ids."""


class TextPerplexity(StageManifest):
    """A model's perplexity on one text."""

    text: str
    num_tokens: int
    """Tokens in all sequences; the first of each is not predicted."""
    perplexity: float
    """exp of the mean over sequences of each sequence's mean token NLL (Zhong et al. 2025)."""


def text_fingerprints(texts: NamedTokens) -> Mapping[str, str]:
    """What identifies texts as a stage's inputs: content, name and place, for all three are in the result."""
    return {f"text {index}: {name}": ref.fingerprint for index, (name, ref) in enumerate(texts, start=1)}


def text_perplexities(model: PreTrainedModel, texts: NamedTokens, runtime: Runtime) -> tuple[TextPerplexity, ...]:
    """The perplexity on each text, with progress in sequences over all of them.

    Raises:
        ConfigurationError: if a text was tokenized with a tokenizer that is not this model's.
    """
    loaded = [(name, load_token_ids(ref.path)) for name, ref in texts]
    total = sum(len(token_ids_BT) for _, token_ids_BT in loaded)
    results: list[TextPerplexity] = []
    done = 0
    for name, token_ids_BT in loaded:
        check_vocabulary(model, name, token_ids_BT)

        def report(part: Progress, before: int = done, note: str = name) -> None:
            runtime.progress(Progress(before + part.done, total, part.unit, note))

        nll_B = sequence_nll(model, token_ids_BT, runtime.batch_size, report)
        if broken := int((~nll_B.isfinite()).sum()):
            remedy = "check the model's weights" if model.dtype == torch.float32 else "try --dtype float32"
            logger.warning(
                "the model's predictions are not finite on %d of the %d sequences of %r: its perplexity is %s; %s",
                *(broken, len(nll_B), name, perplexity(nll_B), remedy),
            )
        results.append(TextPerplexity(text=name, num_tokens=token_ids_BT.numel(), perplexity=perplexity(nll_B)))
        done += len(token_ids_BT)
    return tuple(results)


def check_vocabulary(model: PreTrainedModel, name: str, token_ids_BT: Tensor) -> None:
    """Make sure that a model, which may be on the meta device, knows every token of a text.

    Raises:
        ConfigurationError: if the text was tokenized with a tokenizer that is not this model's.
    """
    vocab_size = len(cast(Tensor, model.get_input_embeddings().weight))
    largest = int(token_ids_BT.max())
    if largest >= vocab_size:
        raise ConfigurationError(
            f"the text {name!r} holds token id {largest}, the model knows {vocab_size} tokens; "
            "prepare the text with the model's own tokenizer, and if it lies beside the model, download the model again"
        )
