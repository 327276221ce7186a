"""What a GGUF file is to hold, or why llama.cpp cannot hold it. Reads configurations; needs no `gguf` package."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from blockpruner.errors import ExportError
from blockpruner.export.attention import windowed_layers
from blockpruner.export.gguf_file.families import DECI, FAMILIES, LLAMA_AS_DECI, Family, Heads, query_scale
from blockpruner.export.gguf_file.layers import FileLayer, file_layers
from blockpruner.export.gguf_file.rotary import Rotary, rotary_of
from blockpruner.export.names import ExportDtype
from blockpruner.export.settings import fewer_layers
from blockpruner.export.source import ExportSource
from blockpruner.export.weights import dtype_of

_LEAST_CONTEXT = 512
_AS_STORED: dict[torch.dtype, ExportDtype] = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class FilePlan:
    """What a file is to hold."""

    source: ExportSource
    family: Family
    layers: tuple[FileLayer, ...]
    rotary: Rotary
    dtype: ExportDtype
    """How matrices are stored."""

    @property
    def heads(self) -> Heads:
        """The attentions' sizes."""
        return Heads.of(self.source.config)

    @property
    def windowed(self) -> list[bool]:
        """Whether every layer's attention is limited to a window; a layer without attention counts as not."""
        windowed = windowed_layers(self.source)
        return [layer.mha in windowed for layer in self.layers]

    @property
    def num_heads(self) -> list[tuple[int, int]]:
        """Heads and key-value heads of every layer."""
        whole, missing = (self.heads.num_heads, self.heads.num_key_value_heads), (0, 0)
        counts = [missing if layer.mha is None else whole for layer in self.layers]
        return [(1, 1) if not number and count == missing else count for number, count in enumerate(counts)]

    @property
    def widths(self) -> list[int]:
        """Width of every layer's feed-forward block."""
        whole = int(self.source.config.intermediate_size)
        return [stand_in_width(whole) if layer.mlp is None else whole for layer in self.layers]


def stand_in_width(intermediate_size: int) -> int:
    """Width of a feed-forward block of zeros.

    32 is what Q8_0 needs. 256 keeps a file whose other rows allow K-quants (multiples of 256) fit for them, and is
    taken where it is small beside the real blocks.
    """
    return 256 if intermediate_size % 256 == 0 and intermediate_size >= 2048 else 32


def make_plan(source: ExportSource) -> FilePlan:
    """Decide how a model is written.

    Raises:
        ExportError: if llama.cpp cannot hold it, with the reason and the formats that can.
    """
    family = _family(source)
    # Refuses what renumbered layers change, and a model without attention.
    layers = source.packed.layers
    fewer_layers(source, [layer.mha for layer in layers], [None] * len(layers))
    plan = FilePlan(source, family, file_layers(source.kept), rotary_of(source.config, family), matrix_dtype(source))
    _check_mathematics(plan)
    _check_windows(plan)
    return plan


def matrix_dtype(source: ExportSource) -> ExportDtype:
    """The dtype asked for, else that of the source's embedding."""
    embedding = source.checkpoint.tensors.get("model.embed_tokens.weight")
    stored = "float32" if embedding is None else _AS_STORED.get(dtype_of(embedding), "float32")
    return source.dtype or stored


def _family(source: ExportSource) -> Family:
    model_type = source.checkpoint.model_type
    if model_type not in FAMILIES:
        raise ExportError(f"format gguf is there for {', '.join(FAMILIES)}, and this is a {model_type}")
    family = FAMILIES[model_type]
    if all(layer.is_whole for layer in file_layers(source.kept)):
        return family
    if not family.as_deci:
        able = ", ".join(name for name, row in FAMILIES.items() if row.as_deci)
        raise ExportError(
            f"llama.cpp runs a {model_type} only where attention and feed-forward blocks alternate, and the surviving "
            f"ones do not (its arch {DECI!r}, whose layers may lack blocks, can be a {able}), "
            "though those of another number of removed blocks may"
        )
    return LLAMA_AS_DECI


def _check_mathematics(plan: FilePlan) -> None:
    """Refuse what llama.cpp's code for the family would compute in another way."""
    config, family, heads = plan.source.config, plan.family, plan.heads
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    caps = [getattr(config, f"{name}_logit_softcapping", None) for name in ("attn", "final")]
    scale = query_scale(family.arch, config, len(plan.layers))
    wrong = {
        f"the activation {activation!r}": activation != family.activation,
        f"heads of {heads.head_size}, not hidden size by number of heads": (
            family.splits_hidden_size and heads.head_size * heads.num_heads != config.hidden_size
        ),
        "an output head of its own": family.head == "tied" and not config.tie_word_embeddings,
        "an output head that is the embedding": family.head == "own" and config.tie_word_embeddings,
        "scores or logits without a cap": family.arch == "gemma2" and None in caps,
        "scores with a cap": family.arch == "gemma3" and caps[0] is not None,
        # Gemma 3's are folded into the norm of its queries.
        f"scores scaled by {getattr(config, 'query_pre_attn_scalar', None)} (query_pre_attn_scalar)": (
            family.arch != "gemma3" and abs(scale - 1) > 1e-9
        ),
    }
    for what, is_wrong in wrong.items():
        if is_wrong:
            raise ExportError(f"llama.cpp's {family.arch} cannot have {what}, as this model has")


def _check_windows(plan: FilePlan) -> None:
    types = set(getattr(plan.source.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if types:
        raise ExportError(f"format gguf does not know attention of type {sorted(types)[0]!r}")
    if not plan.family.has_windows and any(plan.windowed) and context_length(plan) < _LEAST_CONTEXT:
        raise ExportError(
            f"llama.cpp's {plan.family.arch} has no windows, so the context would end at this model's window of "
            f"{context_length(plan)} tokens"
        )


def context_length(plan: FilePlan) -> int:
    """How many tokens the file's model may read.

    Where llama.cpp's code has no windows, a window is the end: up to there it computes what the model computes.
    """
    config, longest = plan.source.config, int(plan.source.config.max_position_embeddings)
    if plan.family.has_windows or not any(plan.windowed):
        return longest
    return min(longest, int(config.sliding_window))
