"""What an export holds in memory at once: a shard, or of a GGUF file a tensor, and never twice of it."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.torch import load_file
from torch import Tensor

from blockpruner.export.gguf_file import encoding
from blockpruner.export.weights import TensorSource, write_tensors


def test_a_shard_is_gone_before_the_next_is_read(tmp_path: Path) -> None:
    alive: dict[int, weakref.ref[Tensor]] = {}

    def source(number: int) -> TensorSource:
        def read() -> Tensor:
            first_of_shard = number - number % 2
            assert not [other for other, ref in alive.items() if ref() is not None and other < first_of_shard]
            tensor = torch.full((8,), float(number))
            alive[number] = weakref.ref(tensor)
            return tensor

        return TensorSource(f"t{number}", 32, read, torch.float32)

    write_tensors([source(number) for number in range(6)], tmp_path, shard_bytes=64)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [sorted(load_file(shard)) for shard in shards] == [["t0", "t1"], ["t2", "t3"], ["t4", "t5"]]


@pytest.mark.parametrize("shape", [(7, 64), (3, 5, 32), (1, 96)])
def test_q8_0_is_made_of_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).bfloat16()
    whole = quantize(tensor.float().numpy(), GGMLQuantizationType.Q8_0)
    sizes: list[int] = []

    def noted(values: Any, kind: GGMLQuantizationType) -> Any:
        sizes.append(values.size)
        return quantize(values, kind)

    monkeypatch.setattr(encoding, "quantize", noted)
    monkeypatch.setattr(encoding, "_QUANTIZED_AT_ONCE", 128)
    np.testing.assert_array_equal(encoding.encoded(tensor, GGMLQuantizationType.Q8_0), whole)
    assert max(sizes) <= 128
    assert sum(sizes) == tensor.numel()
