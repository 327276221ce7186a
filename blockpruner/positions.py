"""How many positions a model knows, where it looks them up in a table: GPT-2, OPT and others that learned them.

A model that computes its positions (RoPE) has no table and no end; its `max_position_embeddings` is advice. Looks at
modules and shapes only, so that a model on the meta device will do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from blockpruner.errors import ConfigurationError

logger = logging.getLogger(__name__)

_NAMES = ("pos", "wpe")
"""What the name of a table of positions has in it."""


def check_sequence_length(model: PreTrainedModel, sequence_length: int) -> None:
    """Refuse sequences that are longer than the model's table of positions; say it where they go against advice.

    Raises:
        ConfigurationError: with the length that the model knows.
    """
    known = num_positions(model)
    if known is not None and sequence_length > known:
        raise ConfigurationError(
            f"sequence_length is {sequence_length}, but this model knows {known} positions; "
            f"give --sequence-length {known} or less"
        )
    advised = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if known is None and advised is not None and sequence_length > advised:
        logger.warning(
            "sequence_length is %d, and the model is made for %d positions (max_position_embeddings): what it predicts "
            "beyond them may be of little use",
            *(sequence_length, advised),
        )


def num_positions(model: PreTrainedModel) -> int | None:
    """The rows of the model's smallest table of positions that a sequence can use; None where it has no table."""
    return min(_tables(model), default=None)


def _tables(model: PreTrainedModel) -> Iterator[int]:
    tokens = model.get_input_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module is not tokens and _is_of_positions(name):
            yield module.num_embeddings - getattr(module, "offset", 0)  # OPT's first rows are of no position
    for name, buffer in model.named_buffers():  # sines that were computed once (GPT-J)
        if buffer.dim() == 2 and buffer.is_floating_point() and _is_of_positions(name):
            yield len(buffer)


def _is_of_positions(name: str) -> bool:
    return any(part in name.rpartition(".")[2] for part in _NAMES)
