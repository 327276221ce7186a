"""The tensors of a GGUF file, made one at a time from a checkpoint's, with stand-ins for blocks that are missing.

Stand-ins, each checked by running llama.cpp (shapes in torch's order; D hidden, H head size):

- A missing attention has no tensors, and the settings say that its layer has no heads. In the first layer the loader
  needs heads: there it is one head of zeros, q, k, v [H, D] and output [D, H].
- A missing feed-forward block is one of zeros, gate and up [W, D], down [D, W]. A width of zero loads, and drops the
  layer's attention without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from blockpruner.blocks import Block
from blockpruner.errors import ExportError
from blockpruner.export.gguf_file.encoding import encoded, num_bytes, tensor_type
from blockpruner.export.gguf_file.families import MODEL_TENSORS, UNWRITTEN_MODULES, query_scale
from blockpruner.export.gguf_file.layers import places
from blockpruner.export.gguf_file.plan import FilePlan


@dataclass(frozen=True)
class FileTensor:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    """In torch's order; GGUF's own is the reverse."""
    kind: GGMLQuantizationType
    read: Callable[[], Tensor]
    """Gives the values, when its turn has come."""

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return num_bytes(self.shape, self.kind)

    def encoded(self) -> Any:
        """Its content in the file, as an array."""
        return encoded(self.read(), self.kind)


def file_tensors(plan: FilePlan) -> Iterator[FileTensor]:
    """All tensors, those of the checkpoint in the order of its files.

    Raises:
        ExportError: for a tensor that llama.cpp has no name for.
    """
    source, where = plan.source, places(plan.layers)
    old_names: dict[str, str] = {}

    def new_name(name: str, block: Block | None) -> str | None:
        renamed = _name(plan, where, name, block)
        if renamed is not None:
            old_names[renamed] = name
        return renamed

    # As stored: what a tensor is rounded to is decided by its shape.
    for tensor in replace(source, dtype=None).tensors(new_name):
        if not tensor.dtype.is_floating_point:
            raise ExportError(f"format gguf is made from floating-point weights, and {old_names[tensor.name]} is none")
        shape = source.checkpoint.tensors[old_names[tensor.name]].shape
        yield _file_tensor(plan, tensor.name, shape, partial(_changed, plan, tensor.name, tensor.read))
    yield from _stand_ins(plan)
    if plan.rotary.factors is not None:
        factors = plan.rotary.factors
        yield _file_tensor(plan, "rope_freqs.weight", tuple(factors.shape), lambda: factors)


def _file_tensor(plan: FilePlan, name: str, shape: tuple[int, ...], read: Callable[[], Tensor]) -> FileTensor:
    return FileTensor(name, shape, tensor_type(shape, plan.dtype), read)


def _name(plan: FilePlan, where: dict[Block, int], name: str, block: Block | None) -> str | None:
    """llama.cpp's name of a checkpoint's tensor; None leaves it out."""
    if name == "lm_head.weight" and plan.source.config.tie_word_embeddings:
        return None
    found = plan.source.architecture.layer_of_tensor(name)
    if block is None or found is None:
        if name not in MODEL_TENSORS:
            raise ExportError(f"format gguf has no name for the tensor {name}")
        return MODEL_TENSORS[name]
    module, _, role = found[2].rpartition(".")
    if block not in where or module in UNWRITTEN_MODULES:
        return None
    if module not in plan.family.tensors or role not in ("weight", "bias"):
        raise ExportError(f"format gguf has no name for the tensor {name}")
    return f"blk.{where[block]}.{plan.family.tensors[module]}.{role}"


def _changed(plan: FilePlan, name: str, read: Callable[[], Tensor]) -> Tensor:
    """A tensor's values as llama.cpp wants them."""
    tensor, part = read(), name.split(".")[-2]
    if part.endswith("_norm"):
        tensor = tensor.float() + plan.family.norm_offset
    if part == "attn_q_norm":
        tensor = tensor * query_scale(plan.family.arch, plan.source.config, len(plan.layers))
    if plan.family.turns_neighbours and part in ("attn_q", "attn_k"):
        heads = plan.heads
        return neighbours_first(tensor, heads.num_heads if part == "attn_q" else heads.num_key_value_heads)
    return tensor


def neighbours_first(tensor: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of a query or key projection, so that those that rotate together become neighbours.

    Args:
        tensor: [num_heads * H, ...]; of each head the row i rotates with the row i + H / 2.
        num_heads: how many heads it has.
    """
    return tensor.reshape(num_heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _stand_ins(plan: FilePlan) -> Iterator[FileTensor]:
    hidden, head_size = int(plan.source.config.hidden_size), plan.heads.head_size
    for number, layer in enumerate(plan.layers):
        if layer.mha is None and number == 0:
            shapes = dict.fromkeys(("attn_q", "attn_k", "attn_v"), (head_size, hidden))
            yield from _zeros(plan, f"blk.{number}.", "attn_norm", shapes | {"attn_output": (hidden, head_size)})
        if layer.mlp is None:
            width = plan.widths[number]
            shapes = dict.fromkeys(("ffn_gate", "ffn_up"), (width, hidden))
            yield from _zeros(plan, f"blk.{number}.", "ffn_norm", shapes | {"ffn_down": (hidden, width)})


def _zeros(plan: FilePlan, prefix: str, norm: str, shapes: dict[str, tuple[int, int]]) -> Iterator[FileTensor]:
    """A block that adds nothing: a norm of ones, and zeros."""
    hidden = int(plan.source.config.hidden_size)
    yield _file_tensor(plan, f"{prefix}{norm}.weight", (hidden,), partial(torch.ones, hidden))
    for name, shape in shapes.items():
        yield _file_tensor(plan, f"{prefix}{name}.weight", shape, partial(torch.zeros, shape))
