"""The gate of a GGUF file: a reader of our own always, and llama.cpp where it is installed."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.errors import ExportError
from blockpruner.export.gguf_file.encoding import FILE_TYPES, rounded
from blockpruner.export.gguf_file.reader import GgufModel
from blockpruner.export.names import ExportDtype
from blockpruner.export.verify import Loading, Verification, ask, compare

_PROGRAM = Path(__file__).with_name("fresh_llama_cpp.py")
_ENGINE_TOLERANCE: dict[ExportDtype, float] = {"float32": 1e-2, "float16": 1e-2, "bfloat16": 4e-2, "q8_0": 8e-2}
"""Of the largest logit. llama.cpp rounds what it multiplies a weight with to the weight's own type, Q8_0 included, and
looks a Gemma's activations up in a table of half precision: it differs from torch by that much where nothing is wrong
(in float32 and without that table by 1e-5)."""


def round_like(model: PreTrainedModel, path: Path) -> None:
    """Make the original's weights as coarse as a file's, in place: what is left to compare is the arithmetic."""
    dtype = matrix_dtype_of(GgufModel(path))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(rounded(parameter, dtype))


def matrix_dtype_of(model: GgufModel) -> ExportDtype:
    """How a file stores matrices, as it says itself."""
    found: int = model.general("general.file_type")
    return next(name for name, number in FILE_TYPES.items() if number == found)


def verify_file(path: Path, request: dict[str, Tensor], expected: dict[str, Tensor], loading: Loading) -> Verification:
    """Compare a file's logits with the masked original's.

    The reader is exact, and says whether the file holds the model. llama.cpp computes more coarsely, and says whether
    it loads the file and understands it in the same way.

    Raises:
        ExportError: if the file cannot be read, or llama.cpp does not load or run it.
    """
    model = GgufModel(path, loading.device, loading.window)
    read = replace(compare(answer(model, request), expected, loading.dtype), engine="reader")
    if not read.passed or find_spec("llama_cpp") is None:
        return read
    try:
        given = ask(_PROGRAM, path, request, *loading.window_option)
    except ExportError as error:
        raise ExportError(f"with llama.cpp {error}") from error
    tolerance = _ENGINE_TOLERANCE[matrix_dtype_of(model)]
    run = replace(compare(given, expected, loading.dtype, tolerance), engine="llama.cpp")
    return replace(run, engine=f"{read.engine}, {run.engine}") if run.passed else run


def answer(model: GgufModel, request: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `fresh_load` answers, by the reader: rows without their padding, one by one."""
    num_answers = request["decode_ids"].shape[1] + 1
    plain = list(request["plain_ids"])
    padded = [
        torch.cat([prompt[mask == 1], decoded])
        for prompt, mask, decoded in zip(
            request["padded_ids"], request["padded_mask"], request["decode_ids"], strict=True
        )
    ]
    logits = [logits_TV.cpu() for logits_TV in model.logits([*plain, *padded])]
    cached = [logits_TV[-num_answers:] for logits_TV in logits[len(plain) :]]
    return {"plain_logits": torch.stack(logits[: len(plain)]), "cached_logits": torch.stack(cached)}
