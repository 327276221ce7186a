"""Copy the surviving tensors of a checkpoint into new safetensors shards, one shard in memory at a time.

Knows names and files; what a tensor is for is decided by the `names` it is given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from blockpruner.checkpoint import Checkpoint

SHARD_BYTES = 4 * 2**30
"""Size of a shard at most, unless one tensor is larger."""


def write_weights(
    checkpoint: Checkpoint, names: Mapping[str, str], out_dir: Path, *, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write the tensors named by `names` (source name to new name) as `model*.safetensors` into `out_dir`.

    Returns:
        The number of bytes of all tensors.
    """
    shards = _assign(checkpoint, names, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, sources in enumerate(shards, start=1):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {names[source]: _read(checkpoint, source) for source in sources}
        save_file(tensors, out_dir / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
    total = sum(checkpoint.tensors[source].num_bytes for source in names)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _assign(checkpoint: Checkpoint, names: Mapping[str, str], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for source in sorted(names, key=lambda name: (str(checkpoint.tensors[name].file), name)):
        size = checkpoint.tensors[source].num_bytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(source)
        filled += size
    return shards


def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    with safe_open(checkpoint.tensors[name].file, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor
