"""From rows of text to token ids [num_sequences, sequence_length], the way the paper's calibration set is made.

Rows are joined with a blank line, tokenized once, cut into sequences, and the tail is dropped. Which rows, and where
they come from, is the caller's business.

Shapes: `B` sequences, `T` tokens of a sequence.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blockpruner.errors import ArtifactError, ConfigurationError, TextSourceError

TOKEN_FILE = "tokens.safetensors"
"""Name of the file that holds token ids, inside the folder of a calibration set or an evaluation text."""

_TENSOR_NAME = "token_ids"
_ROW_SEPARATOR = "\n\n"


def paper_sample(num_rows: int, num_samples: int, seed: int) -> list[int]:
    """Indices of the rows that the reference implementation draws, in the order in which it draws them.

    It seeds Python's global generator and calls `random.sample(range(num_rows), num_samples)`; a generator of its own
    with the same seed gives the same indices and leaves the global one alone.

    Raises:
        TextSourceError: if there are fewer rows than samples.
    """
    if num_samples > num_rows:
        raise TextSourceError(
            f"{num_samples} samples were asked for, the text has {num_rows} rows; ask for at most {num_rows}, "
            "or for all, which takes them in order"
        )
    return random.Random(seed).sample(range(num_rows), num_samples)


def cut_into_sequences(rows: Sequence[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Tensor:
    """Join rows with a blank line, tokenize once, cut; the tail that fills no sequence is dropped.

    The tokenizer adds its own special tokens, once, to the joined text, as in the reference implementation.

    Returns:
        int64 [B, T], T = `sequence_length`.

    Raises:
        ConfigurationError: if a sequence is shorter than two tokens (nothing to predict).
        TextSourceError: if the text does not fill one sequence.
    """
    if sequence_length < 2:
        raise ConfigurationError(f"a sequence length of {sequence_length} leaves nothing to predict; give 2 or more")
    # verbose=False: that the text is longer than the model's context is the plan here, not worth a warning.
    token_ids = tokenizer(_ROW_SEPARATOR.join(rows), verbose=False)["input_ids"]
    num_sequences = len(token_ids) // sequence_length
    if num_sequences == 0:
        raise TextSourceError(
            f"the text is too short: {len(token_ids)} tokens from {len(rows)} rows, "
            f"one sequence needs {sequence_length}; give more rows or a smaller sequence length"
        )
    ids_N = torch.tensor(token_ids[: num_sequences * sequence_length], dtype=torch.int64)
    return ids_N.view(num_sequences, sequence_length)


def save_token_ids(token_ids_BT: Tensor, folder: Path) -> None:
    """Write token ids [B, T] as `TOKEN_FILE` into a folder."""
    save_file({_TENSOR_NAME: token_ids_BT.contiguous()}, folder / TOKEN_FILE)


def load_token_ids(folder: Path) -> Tensor:
    """Read token ids, int64 [B, T], from a folder that `save_token_ids` wrote to.

    Raises:
        ArtifactError: if the file is not there or damaged.
    """
    path = folder / TOKEN_FILE
    try:
        return load_file(path)[_TENSOR_NAME]
    except (OSError, SafetensorError, KeyError) as error:
        raise ArtifactError(f"{path} holds no token ids ({error}); delete its folder and calibrate again") from error
