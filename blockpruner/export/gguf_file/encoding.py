"""Weights as a GGUF file stores them: which type a tensor gets, to bytes and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from gguf.quants import dequantize, quantize
from torch import Tensor

from blockpruner.export.names import ExportDtype

FILE_TYPES: dict[ExportDtype, LlamaFileType] = {
    "float32": LlamaFileType.ALL_F32,
    "float16": LlamaFileType.MOSTLY_F16,
    "bfloat16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
}
_TENSOR_TYPES: dict[ExportDtype, GGMLQuantizationType] = {
    "float32": GGMLQuantizationType.F32,
    "float16": GGMLQuantizationType.F16,
    "bfloat16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
_QUANTIZED_ROW = 32
"""Values that share a scale in Q8_0."""
_QUANTIZED_AT_ONCE = 2**20
"""Values that are turned into Q8_0 in one go."""


def tensor_type(shape: Sequence[int], dtype: ExportDtype) -> GGMLQuantizationType:
    """Norms and biases are F32 always; a matrix whose rows are no multiple of 32 long is F16 where Q8_0 is wanted."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if dtype == "q8_0" and shape[-1] % _QUANTIZED_ROW:
        return GGMLQuantizationType.F16
    return _TENSOR_TYPES[dtype]


def encoded(tensor: Tensor, kind: GGMLQuantizationType) -> Any:
    """The array that a file holds."""
    if kind == GGMLQuantizationType.F16:
        return tensor.to(torch.float16).numpy()
    if kind == GGMLQuantizationType.BF16:
        return tensor.to(torch.bfloat16).view(torch.int16).numpy()
    if kind == GGMLQuantizationType.Q8_0:
        return _quantized(tensor)
    return tensor.to(torch.float32).numpy()


def _quantized(tensor: Tensor) -> Any:
    """Some rows after others: all at once they would be in memory several times, as float32."""
    step = max(1, _QUANTIZED_AT_ONCE // tensor.shape[-1])
    rows = tensor.reshape(-1, tensor.shape[-1])
    encoded_rows = np.empty((rows.shape[0], num_bytes(rows.shape[-1:], GGMLQuantizationType.Q8_0)), dtype=np.uint8)
    for start in range(0, rows.shape[0], step):
        values = rows[start : start + step].to(torch.float32).numpy()
        encoded_rows[start : start + step] = quantize(values, GGMLQuantizationType.Q8_0)
    return encoded_rows.reshape(*tensor.shape[:-1], -1)


def num_bytes(shape: Sequence[int], kind: GGMLQuantizationType) -> int:
    """The size of that array."""
    count = int(torch.Size(shape).numel())
    if kind == GGMLQuantizationType.Q8_0:  # 32 bytes and a half-precision scale
        return count // _QUANTIZED_ROW * 34
    return count * (4 if kind == GGMLQuantizationType.F32 else 2)


def rounded(tensor: Tensor, dtype: ExportDtype) -> Tensor:
    """What is left of a weight after it was stored, in its own dtype and on its own device."""
    kind = tensor_type(tensor.shape, dtype)
    if kind == GGMLQuantizationType.Q8_0:
        stored = torch.from_numpy(dequantize(encoded(tensor.cpu(), kind), kind))
        return stored.to(tensor.device, tensor.dtype)
    if kind == GGMLQuantizationType.F32:
        return tensor
    return tensor.to(torch.float16 if kind == GGMLQuantizationType.F16 else torch.bfloat16).to(tensor.dtype)
