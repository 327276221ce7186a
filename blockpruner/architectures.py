"""The table of model families: where a decoder keeps its layers and what in a layer belongs to which block.

What differs between families is data here; everything else in the library asks this table. It knows module and tensor
names, and runs no model.
"""

from __future__ import annotations

import dataclasses
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
    aliases: tuple[str, ...] = ()
    """Other names of these modules in published checkpoints."""
    outputs: tuple[str, ...] = ("o_proj", "down_proj")
    """What the tensors of the last projections are called: with zeros in them the block adds nothing."""

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
    final_norm: str = "model.norm"
    """Path of the norm between the last decoder layer and the head."""
    mha: BlockLayout = BlockLayout("self_attn", ("input_layernorm",), returns_pair=True)
    mlp: BlockLayout = BlockLayout("mlp", ("post_attention_layernorm",))
    shared: tuple[str, ...] = ()
    """Modules of a layer that serve both blocks, and stay while the layer has one of them."""
    is_parallel: bool = False
    """Whether both blocks of a layer read the same input, and not one the other's output."""
    layer_returns_tuple: bool = False
    """Whether a decoder layer returns a tuple and not a bare tensor."""
    other_layer_prefixes: tuple[str, ...] = ()
    """Where published checkpoints keep the layers if not under `layers`."""
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

    def final_norm_of(self, model: nn.Module) -> nn.Module | None:
        """The norm before the head of a loaded causal-LM model; None if it has none, or elsewhere, as own code may."""
        parent, _, name = self.final_norm.rpartition(".")
        norm: nn.Module | None = getattr(model.get_submodule(parent), name, None)
        return norm

    def layer_of_tensor(self, tensor_name: str) -> tuple[str, int, str] | None:
        """(prefix up to the layers, layer index, rest) of a tensor's name; None for one outside the layers."""
        for prefix in (self.layers, *self.other_layer_prefixes):
            index, dot, rest = tensor_name.removeprefix(prefix + ".").partition(".")
            if tensor_name.startswith(prefix + ".") and dot and index.isdecimal():
                return prefix, int(index), rest
        return None

    def placed(self, tensor_name: str, place: str) -> str:
        """A layer's tensor under another number ('3') or place ('3.mlps.0')."""
        found = self.layer_of_tensor(tensor_name)
        assert found is not None
        return f"{found[0]}.{place}.{found[2]}"

    def block_of_tensor(self, tensor_name: str) -> Block | None:
        """The block that a checkpoint's tensor belongs to; None for one that belongs to no single block.

        Raises:
            UnsupportedArchitectureError: if the tensor lies in a decoder layer but in none of its known modules, so
                that removing blocks would leave it behind.
        """
        found = self.layer_of_tensor(tensor_name)
        if found is None and not tensor_name.startswith(self.layers + "."):
            return None
        _, index, rest = found or ("", 0, "")
        for kind in BlockKind:
            if any(rest.startswith(module + ".") for module in self.block(kind).modules + self.block(kind).aliases):
                return Block(layer_index=index, block_kind=kind)
        if any(rest.startswith(module + ".") for module in self.shared):
            return None
        raise UnsupportedArchitectureError(
            f"tensor {tensor_name!r} belongs to neither block of a {self.model_type} layer; "
            "the checkpoint has parts that this family's table does not know, and cannot be pruned safely"
        )


def _gpt2(row: Architecture, config: PreTrainedConfig) -> Architecture:
    """Cross-attention is a third residual block."""
    if config.add_cross_attention:
        raise UnsupportedArchitectureError("this GPT-2 has cross-attention, which is neither of a layer's two blocks")
    return row


def _gpt_neox(row: Architecture, config: PreTrainedConfig) -> Architecture:
    """Parallel in all published models; each block has its own norm either way."""
    return dataclasses.replace(row, is_parallel=bool(config.use_parallel_residual))


def _opt(row: Architecture, config: PreTrainedConfig) -> Architecture:
    """A norm of the stream itself is never the identity."""
    if not config.do_layer_norm_before:
        raise UnsupportedArchitectureError(
            "this OPT normalises the stream after each block (do_layer_norm_before is false, as in opt-350m), "
            "so a block can never be the identity; OPT models with do_layer_norm_before can be pruned"
        )
    return row


def _falcon(row: Architecture, config: PreTrainedConfig) -> Architecture:
    """Sequential, or parallel with a norm that serves both blocks, or parallel with a norm each."""
    is_new, is_parallel = bool(config.new_decoder_architecture), bool(config.parallel_attn)
    has_two_norms = is_parallel and (config.num_ln_in_parallel_attn or (2 if is_new else 1)) == 2
    if config.alibi:
        raise UnsupportedArchitectureError(
            "this Falcon uses ALiBi (alibi is true), whose biases depend on the batch; Falcon models with rotary "
            "positions can be pruned"
        )
    if (is_new and not is_parallel) or (has_two_norms and not is_new):
        raise UnsupportedArchitectureError(
            "transformers cannot run this Falcon: new_decoder_architecture needs parallel_attn, and two norms "
            "(num_ln_in_parallel_attn) need new_decoder_architecture"
        )
    if not is_parallel:
        return row
    return dataclasses.replace(
        row,
        is_parallel=True,
        mha=dataclasses.replace(row.mha, passed=("ln_attn",) if has_two_norms else ()),
        mlp=dataclasses.replace(row.mlp, passed=("ln_mlp",) if has_two_norms else ()),
        shared=() if has_two_norms else ("input_layernorm",),
    )


def _attention(compute: str, *passed: str, outputs: tuple[str, ...] = ("o_proj",)) -> BlockLayout:
    """An attention that returns its weights as well, as all do."""
    return BlockLayout(compute, passed, returns_pair=True, outputs=outputs)


_SANDWICH_MHA = _attention("self_attn", "input_layernorm", "post_attention_layernorm")
_SANDWICH_MLP = BlockLayout("mlp", ("pre_feedforward_layernorm", "post_feedforward_layernorm"))
_COHERE = Architecture(
    "cohere",
    "Cohere",
    mha=_attention("self_attn"),
    mlp=BlockLayout("mlp", ()),
    shared=("input_layernorm",),
    is_parallel=True,
)

_TABLE = {
    architecture.model_type: architecture
    for architecture in (
        _COHERE,
        dataclasses.replace(_COHERE, model_type="cohere2", class_prefix="Cohere2"),
        Architecture(
            "falcon",
            "Falcon",
            layers="transformer.h",
            final_norm="transformer.ln_f",
            mha=_attention("self_attention", "input_layernorm", outputs=("dense",)),
            mlp=BlockLayout("mlp", ("post_attention_layernorm",), outputs=("dense_4h_to_h",)),
            layer_returns_tuple=True,
            variant=_falcon,
        ),
        Architecture("gemma", "Gemma"),
        Architecture("gemma2", "Gemma2", mha=_SANDWICH_MHA, mlp=_SANDWICH_MLP),
        Architecture("gemma3_text", "Gemma3", mha=_SANDWICH_MHA, mlp=_SANDWICH_MLP),
        Architecture(
            "gpt2",
            "GPT2",
            layers="transformer.h",
            final_norm="transformer.ln_f",
            mha=_attention("attn", "ln_1", outputs=("c_proj",)),
            mlp=BlockLayout("mlp", ("ln_2",), outputs=("c_proj",)),
            other_layer_prefixes=("h",),
            variant=_gpt2,
        ),
        Architecture(
            "gpt_neox",
            "GPTNeoX",
            layers="gpt_neox.layers",
            final_norm="gpt_neox.final_layer_norm",
            mha=_attention("attention", "input_layernorm", outputs=("dense",)),
            mlp=BlockLayout("mlp", ("post_attention_layernorm",), outputs=("dense_4h_to_h",)),
            variant=_gpt_neox,
        ),
        Architecture("llama", "Llama"),
        Architecture("mistral", "Mistral"),
        Architecture(
            "mixtral",
            "Mixtral",
            mlp=BlockLayout(
                "mlp", ("post_attention_layernorm",), aliases=("block_sparse_moe",), outputs=("down_proj", "w2")
            ),
        ),
        Architecture(
            "olmo2",
            "Olmo2",
            mha=_attention("self_attn", "post_attention_layernorm"),
            mlp=BlockLayout("mlp", ("post_feedforward_layernorm",)),
        ),
        Architecture(
            "opt",
            "OPT",
            layers="model.decoder.layers",
            final_norm="model.decoder.final_layer_norm",
            mha=_attention("self_attn", "self_attn_layer_norm", outputs=("out_proj",)),
            mlp=BlockLayout("fc2", ("fc1", "final_layer_norm"), outputs=("fc2",)),
            other_layer_prefixes=("decoder.layers",),
            variant=_opt,
        ),
        Architecture("phi3", "Phi3"),
        Architecture("qwen2", "Qwen2"),
        Architecture("qwen2_moe", "Qwen2Moe"),
        Architecture("qwen3", "Qwen3"),
        Architecture("qwen3_moe", "Qwen3Moe"),
    )
}

_REFUSED = {
    "bloom": "its blocks add the residual themselves, so a block cannot be bypassed from outside",
    "mpt": "its blocks add the residual themselves, so a block cannot be bypassed from outside",
}
"""Families that are known and cannot be pruned, with the reason."""

KNOWN_MODEL_TYPES: tuple[str, ...] = tuple(sorted(_TABLE))
"""The families that can be pruned, and exported as `stock` or `zeroed` at least."""


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
