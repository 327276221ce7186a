"""What an export is made from: a checkpoint, the blocks that go, and what follows from the two. Writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from transformers import AutoConfig

from blockpruner.architectures import Architecture, architecture_of
from blockpruner.blocks import Block, survivors
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import ExportError
from blockpruner.export.names import ExportDtype
from blockpruner.export.weights import TensorSource, copied, dtype_of, read_tensor
from blockpruner.merging import Combination, combinations, combined, is_merged
from blockpruner.surgery import PackedModel, pack
from blockpruner.trace import LayerMerge

_DTYPE_SETTINGS = ("dtype", "torch_dtype")
_CODE_SETTINGS = frozenset({"auto_map", "custom_pipelines", "model_file"})
"""Settings that name code: the source's own never goes with an export, which brings the exporter's or none. The last
one is MLX-LM's."""


@dataclass(frozen=True)
class ExportSource:
    """A model and the blocks to remove from it."""

    checkpoint: Checkpoint
    config: Any
    """transformers' configuration, with what config.json leaves to be derived."""
    architecture: Architecture
    removed: tuple[Block, ...]
    """In the order of their removal."""
    dtype: ExportDtype | None = None
    """Dtype of the weights that are written; None: as they are."""
    merges: tuple[LayerMerge, ...] = ()
    """What became of removed layers' weights, in order; empty where they are just gone."""

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        removed: Sequence[Block],
        dtype: ExportDtype | None = None,
        merges: Sequence[LayerMerge] = (),
    ) -> ExportSource:
        """Read the configuration and the table.

        Raises:
            UnsupportedArchitectureError: if the family is not in the table.
        """
        config = AutoConfig.from_pretrained(checkpoint.path)
        architecture = architecture_of(checkpoint.model_type).for_config(config)
        return cls(checkpoint, config, architecture, tuple(removed), dtype, tuple(merges))

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """`dtype` where it is one of torch's."""
        return getattr(torch, self.dtype, None) if self.dtype else None

    @property
    def num_layers(self) -> int:
        """Of the original."""
        return int(self.config.num_hidden_layers)

    @cached_property
    def kept(self) -> tuple[Block, ...]:
        """The surviving blocks, in stream order."""
        return survivors(self.num_layers, self.removed)

    @cached_property
    def packed(self) -> PackedModel:
        """The surviving blocks, each attention with the feed-forward blocks that follow it.

        Raises:
            ExportError: if no attention survives, or the two blocks of a layer read the same input, so that they
                cannot be paired with others.
        """
        if self.architecture.is_parallel:
            family = self.checkpoint.model_type
            raise ExportError(f"the two blocks of a {family} layer work side by side and cannot be packed with others")
        return pack(self.num_layers, self.removed)

    def settings(self, **changes: Any) -> dict[str, Any]:
        """The source's own config.json with changes, and without the names of any code.

        Other settings stay in the words of the source: engines other than transformers 5 read `rope_theta` at the top
        level, which `config.to_dict()` drops.
        """
        left_out = _CODE_SETTINGS | {"_name_or_path"}
        settings = {key: value for key, value in self.checkpoint.config.items() if key not in left_out}
        if self.dtype is not None:
            settings |= {name: self.dtype for name in _DTYPE_SETTINGS if name in settings} or {"dtype": self.dtype}
        return settings | changes

    def tensors(self, new_name: Callable[[str, Block | None], str | None]) -> list[TensorSource]:
        """The tensors to write.

        Args:
            new_name: a tensor's name in the export, from its name and block (None: of no single block); None leaves it
                out.

        Raises:
            UnsupportedArchitectureError: if the checkpoint has tensors that belong to no known part.
        """
        names = {
            name: renamed
            for name in self.checkpoint.tensors
            if (renamed := new_name(name, self.architecture.block_of_tensor(name))) is not None
        }
        sources = self._with_merges(names, copied(self.checkpoint, names))
        return [source.converted(self.torch_dtype) for source in sources] if self.torch_dtype else sources

    def _with_merges(self, names: Mapping[str, str], sources: list[TensorSource]) -> list[TensorSource]:
        """Sums in the place of the merged layers' own weights."""
        made = combinations(self.merges)
        old_names = {new: old for old, new in names.items()}

        def with_merge(source: TensorSource) -> TensorSource:
            name = old_names[source.name]
            found = self.architecture.layer_of_tensor(name)
            if found is None or found[1] not in made or not is_merged(found[2]) or not source.dtype.is_floating_point:
                return source
            return replace(source, read=partial(self._combined, name, made[found[1]]))

        return [with_merge(source) for source in sources]

    def _combined(self, name: str, combination: Combination) -> torch.Tensor:
        places = {self.architecture.placed(name, str(index)): by for index, by in combination.items()}
        parts = [(by, read_tensor(self.checkpoint, place)) for place, by in places.items()]
        return combined(parts, dtype_of(self.checkpoint.tensors[name]))
