"""Write tensors as safetensors shards, one shard in memory at a time.

Knows names and files; what a tensor is for, and how it is made from a source's, is decided by who lists it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from blockpruner.checkpoint import Checkpoint, TensorEntry

SHARD_BYTES = 4 * 2**30
"""Size of a shard at most, unless one tensor is larger."""

_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorSource:
    """One tensor to write."""

    name: str
    num_bytes: int
    read: Callable[[], torch.Tensor]
    """Gives the tensor, when its shard's turn has come."""
    dtype: torch.dtype
    """Of what `read` gives."""

    def converted(self, dtype: torch.dtype) -> TensorSource:
        """The same tensor in another floating-point dtype; integers stay as they are."""
        if not self.dtype.is_floating_point or self.dtype == dtype:
            return self
        num_bytes = self.num_bytes // self.dtype.itemsize * dtype.itemsize
        return TensorSource(self.name, num_bytes, lambda: self.read().to(dtype), dtype)

    def zeroed(self) -> TensorSource:
        """Zeros in the place of the tensor."""
        return replace(self, read=lambda: torch.zeros_like(self.read()))


def dtype_of(entry: TensorEntry) -> torch.dtype:
    """A stored tensor's dtype; one that torch does not know counts as bytes."""
    return _TORCH_DTYPES.get(entry.dtype, torch.uint8)


def copied(checkpoint: Checkpoint, names: Mapping[str, str]) -> list[TensorSource]:
    """The tensors named by `names` (source name to new name), as they are in a checkpoint, in its files' order."""
    entries = checkpoint.tensors
    order = sorted(names, key=lambda name: (str(entries[name].file), name))
    return [
        TensorSource(
            names[name], entries[name].num_bytes, partial(read_tensor, checkpoint, name), dtype_of(entries[name])
        )
        for name in order
    ]


def write_tensors(sources: Iterable[TensorSource], out_dir: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as `model*.safetensors` into `out_dir`, with an index where there are several files."""
    shards = _assign(sources, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(shard, out_dir / file_name)
        weight_map |= {source.name: file_name for source in shard}
    if len(shards) > 1:
        total = sum(source.num_bytes for shard in shards for source in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(shard: Sequence[TensorSource], path: Path) -> None:
    """In a function of its own, so that its tensors are gone before the next shard is read."""
    save_file({source.name: source.read() for source in shard}, path, metadata={"format": "pt"})


def _assign(sources: Iterable[TensorSource], shard_bytes: int) -> Sequence[Sequence[TensorSource]]:
    shards: list[list[TensorSource]] = [[]]
    filled = 0
    for source in sources:
        if shards[-1] and filled + source.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(source)
        filled += source.num_bytes
    return shards


def read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor as it is in a checkpoint."""
    with safe_open(checkpoint.tensors[name].file, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor
