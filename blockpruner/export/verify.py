"""The gate of every export: its logits, from a fresh process, against the masked original.

Two batches are compared: a plain one, and a left-padded one that is decoded token by token with the cache, which is
where wrongly packed models go wrong in silence. The masked original answers both without a cache.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.architectures import Architecture
from blockpruner.blocks import Block
from blockpruner.errors import ExportError
from blockpruner.fresh_process import run_fresh
from blockpruner.loading import DtypeName
from blockpruner.masking import masked

_FRESH_LOAD = Path(__file__).with_name("fresh_load.py")
_RELATIVE_TOLERANCE: dict[DtypeName, float] = {"float32": 1e-5, "bfloat16": 2e-2}
"""Of the largest logit, and at least of 1."""
_NUM_DECODED = 8


@dataclass(frozen=True)
class Verification:
    """How an export compares with the masked original."""

    max_logit_difference: float
    tolerance: float
    engine: str = "transformers"
    """What loaded the export; several, with commas between them, where one after another did."""

    @property
    def passed(self) -> bool:
        """Whether the export computes the same; a NaN does not."""
        return self.max_logit_difference <= self.tolerance


@dataclass(frozen=True)
class Loading:
    """How a fresh process is to load an export."""

    device: str
    dtype: DtypeName
    """Of the computation, which is the masked original's too."""
    has_code: bool = False
    """Whether the exporter has put model code into the folder: no other code is ever run."""
    window: int | None = None
    """How many tokens its windows are to be long; None: as the files say (see `shorter_window`)."""

    @property
    def window_option(self) -> list[str]:
        """The window, for the command line of the fresh process."""
        return [] if self.window is None else ["--sliding-window", str(self.window)]


class Verifier(Protocol):
    """Loads an export in a fresh process and compares; see `verify`, which does it with transformers."""

    def __call__(
        self, export_dir: Path, request: dict[str, Tensor], expected: dict[str, Tensor], loading: Loading
    ) -> Verification:
        """How the export compares."""


def verification_request(vocab_size: int, max_positions: int, seed: int = 0) -> dict[str, Tensor]:
    """Random token batches: `plain_ids`, and `padded_ids`, `padded_mask`, `decode_ids` (see `fresh_load`)."""
    generator = torch.Generator().manual_seed(seed)
    length = max(4, min(32, max_positions - _NUM_DECODED))
    padded_mask = torch.ones(3, length, dtype=torch.long)
    padded_mask[1, : length // 4] = 0
    padded_mask[2, : length // 2] = 0
    return {
        "plain_ids": torch.randint(vocab_size, (2, length), generator=generator),
        "padded_ids": torch.randint(vocab_size, (3, length), generator=generator),
        "padded_mask": padded_mask,
        "decode_ids": torch.randint(vocab_size, (3, _NUM_DECODED), generator=generator),
    }


def shorter_window(window: int | None, request: dict[str, Tensor]) -> int | None:
    """The window that export and original are given for the comparison, in place of their own; None: their own.

    Of a window longer than the request nothing would be seen, not even in which layers it is; and a request that is
    longer than a window of thousands of tokens would take minutes.

    Args:
        window: of the export's attentions, as its files say; None: they have none.
        request: from `verification_request`.
    """
    seen = request["plain_ids"].shape[1] // 2
    return seen if window is not None and window > seen else None


def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round what a checkpoint stores of a model, in place; what the model computes with keeps its dtype.

    Loading it in `dtype` would also round what a checkpoint does not store, such as Gemma's scale of embeddings.
    """
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(dtype))


@torch.inference_mode()
def masked_logits(
    architecture: Architecture, model: PreTrainedModel, removed: Sequence[Block], request: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What the export must answer, from the original with the removed blocks bypassed and no cache."""
    request = {name: tensor.to(model.device) for name, tensor in request.items()}
    ids = torch.cat([request["padded_ids"], request["decode_ids"]], dim=1)
    mask = torch.cat([request["padded_mask"], torch.ones_like(request["decode_ids"])], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    first = request["padded_ids"].shape[1] - 1
    with masked(architecture, model, removed):
        plain = model(input_ids=request["plain_ids"], use_cache=False).logits
        padded = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return {"plain_logits": plain.float().cpu(), "cached_logits": padded[:, first:].float().cpu()}


def verify(export_dir: Path, request: dict[str, Tensor], expected: dict[str, Tensor], loading: Loading) -> Verification:
    """Load the export in a fresh process and compare.

    Raises:
        ExportError: if the fresh process cannot load or run it.
    """
    answer = _ask_fresh_process(export_dir, request, loading)
    return compare(answer, expected, loading.dtype)


def compare(
    answer: dict[str, Tensor], expected: dict[str, Tensor], dtype: DtypeName, engine_tolerance: float = 0.0
) -> Verification:
    """How two sets of logits compare; a NaN or an infinity anywhere makes the difference NaN or infinite.

    Args:
        answer: of the export.
        expected: of the masked original.
        dtype: in which the original computed.
        engine_tolerance: what an engine with coarser arithmetic may differ by, of the largest logit.
    """
    # Tensor.max, unlike Python's, lets no NaN pass; an infinite logit must not make the tolerance infinite.
    difference = torch.stack([(answer[name] - expected[name]).abs().max() for name in expected]).max()
    finite = [tensor[tensor.isfinite()].abs() for tensor in expected.values()]
    largest = float(torch.cat([torch.ones(1), *finite]).max())
    return Verification(float(difference), max(_RELATIVE_TOLERANCE[dtype], engine_tolerance) * largest)


def _ask_fresh_process(export_dir: Path, request: dict[str, Tensor], loading: Loading) -> dict[str, Tensor]:
    code = ["--has-code"] if loading.has_code else []
    options = ["--device", loading.device, "--dtype", loading.dtype, *code, *loading.window_option]
    return ask(_FRESH_LOAD, export_dir, request, *options)


def ask(program: Path, export_dir: Path, request: dict[str, Tensor], *options: str) -> dict[str, Tensor]:
    """Run a program that loads an export and answers a request, such as `fresh_load`, in a process of its own.

    Raises:
        ExportError: if it fails, with the last line that it wrote.
    """
    # Beside the export: who is killed here leaves nothing that does not go with the unfinished export.
    with tempfile.TemporaryDirectory(prefix=".asked-", dir=export_dir.parent) as folder:
        asked, answered = Path(folder, "request.safetensors"), Path(folder, "answer.safetensors")
        save_file(request, asked)
        finished = run_fresh(program, str(export_dir), str(asked), str(answered), *options)
        if finished.returncode != 0:
            reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
            raise ExportError(f"the export cannot be loaded in a fresh process: {reason}")
        return load_file(answered)
