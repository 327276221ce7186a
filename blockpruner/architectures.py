"""The table of model families: where a decoder keeps its layers and what in a layer belongs to which block.

What differs between families is data here; everything else in the library asks this table. It knows module and tensor
names, and runs no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedConfig

from blockpruner.blocks import Block, BlockKind, all_blocks
from blockpruner.errors import UnsupportedArchitectureError, nearest


@dataclass(frozen=True)
class BlockLayout:
    """The modules of one kind of block, by their names within a decoder layer."""

    compute: str
    """The module whose output is added to the residual stream; a bypass makes it give zeros."""
    passed: tuple[str, ...]
    """The other modules that serve this block alone and leave with it, norms above all; a bypass lets through what
    they are given."""
    returns_pair: bool = False
    """Whether the module returns (output, attention weights) and not a bare tensor."""

    @property
    def modules(self) -> tuple[str, ...]:
        """All modules that leave with the block."""
        return (self.compute, *self.passed)


@dataclass(frozen=True)
class Architecture:
    """One family of decoder models, keyed by the `model_type` of its config.json."""

    model_type: str
    class_prefix: str
    """How the family's classes begin in transformers: 'Llama' of `LlamaForCausalLM`."""
    layers: str = "model.layers"
    """Path of the list of decoder layers, from the causal-LM model; also the prefix of its tensors in a checkpoint."""
    mha: BlockLayout = BlockLayout("self_attn", ("input_layernorm",), returns_pair=True)
    mlp: BlockLayout = BlockLayout("mlp", ("post_attention_layernorm",))
    shared: tuple[str, ...] = ()
    """Modules of a layer that serve both blocks, and stay while the layer has one of them."""
    is_parallel: bool = False
    """Whether both blocks of a layer read the same input, and not one the other's output."""
    layer_returns_tuple: bool = False
    """Whether a decoder layer returns a tuple and not a bare tensor."""
    variant: Callable[[Architecture, PreTrainedConfig], Architecture] | None = None
    """Gives the row for one model of a family whose layers depend on the configuration, or refuses the model."""

    def for_config(self, config: PreTrainedConfig) -> Architecture:
        """This row as it is for one model.

        Raises:
            UnsupportedArchitectureError: if a block of this model can never be the identity; with the reason.
        """
        return self.variant(self, config) if self.variant else self

    def layer_result(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, None]:
        """A hidden state in the form in which this family's layers return it."""
        return (hidden_states, None) if self.layer_returns_tuple else hidden_states

    def block(self, kind: BlockKind) -> BlockLayout:
        """The modules of a kind of block."""
        return self.mha if kind is BlockKind.MHA else self.mlp

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers of a loaded causal-LM model."""
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def block_of_tensor(self, tensor_name: str) -> Block | None:
        """The block that a checkpoint's tensor belongs to; None for one that belongs to no single block.

        Raises:
            UnsupportedArchitectureError: if the tensor lies in a decoder layer but in none of its known modules, so
                that removing blocks would leave it behind.
        """
        prefix = self.layers + "."
        if not tensor_name.startswith(prefix):
            return None
        index, _, rest = tensor_name.removeprefix(prefix).partition(".")
        for kind in BlockKind:
            if index.isdecimal() and any(rest.startswith(module + ".") for module in self.block(kind).modules):
                return Block(layer_index=int(index), block_kind=kind)
        if index.isdecimal() and any(rest.startswith(module + ".") for module in self.shared):
            return None
        raise UnsupportedArchitectureError(
            f"tensor {tensor_name!r} belongs to neither block of a {self.model_type} layer; "
            "the checkpoint has parts that this family's table does not know, and cannot be pruned safely"
        )


_TABLE = {
    architecture.model_type: architecture
    for architecture in (
        Architecture("llama", "Llama"),
        Architecture("mistral", "Mistral"),
        Architecture("qwen2", "Qwen2"),
        Architecture("qwen3", "Qwen3"),
    )
}

_REFUSED = {
    "bloom": "its blocks add the residual themselves, so a block cannot be bypassed from outside",
    "mpt": "its blocks add the residual themselves, so a block cannot be bypassed from outside",
}
"""Families that are known and cannot be pruned, with the reason."""

KNOWN_MODEL_TYPES: tuple[str, ...] = tuple(sorted(_TABLE))


def architecture_of(model_type: str) -> Architecture:
    """The table's row for a model type.

    Raises:
        UnsupportedArchitectureError: naming the type and listing the known ones.
    """
    if model_type in _REFUSED:
        raise UnsupportedArchitectureError(f"models of type {model_type!r} cannot be pruned: {_REFUSED[model_type]}")
    if model_type not in _TABLE:
        raise UnsupportedArchitectureError(
            f"unknown architecture {model_type!r}; known are {', '.join(KNOWN_MODEL_TYPES)}"
            f"{nearest(model_type, KNOWN_MODEL_TYPES)}"
        )
    return _TABLE[model_type]


def block_modules(architecture: Architecture, model: nn.Module, block: Block) -> Iterator[nn.Module]:
    """The modules of a loaded model that leave with a block."""
    layer = architecture.decoder_layers(model)[block.layer_index]
    for name in architecture.block(block.block_kind).modules:
        yield layer.get_submodule(name)


def block_sizes(architecture: Architecture, model: nn.Module) -> dict[Block, int]:
    """Number of parameters of every block, its norms included; also right for a model on the meta device."""
    return {
        block: sum(
            parameter.numel()
            for module in block_modules(architecture, model, block)
            for parameter in module.parameters()
        )
        for block in all_blocks(len(architecture.decoder_layers(model)))
    }


def num_parameters(model: nn.Module) -> int:
    """Number of a model's parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
