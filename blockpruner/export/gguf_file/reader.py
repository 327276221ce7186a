"""A reader of our own: computes a GGUF file's logits with torch, from nothing but the file.

It follows llama.cpp's code for each arch (`src/models/*.cpp`), its traps included: a layer whose feed-forward block is
zero wide gives back what it was given, without its attention; a file that lacks a tensor, or has one that nothing
reads, is refused. It shares no code with the writer, holds one layer of weights in memory at a time, in float32, and
knows neither cache nor padding: every sequence is computed alone and whole.

Shapes: T tokens, D hidden, H head size, N heads, K key-value heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor
from torch.nn import functional

from blockpruner.errors import ExportError


@dataclass(frozen=True)
class _Arch:
    """What llama.cpp's code for an arch does that no setting says."""

    turns_neighbours: bool = False
    is_gemma: bool = False
    """The embedding is multiplied by the root of D, and gates pass a GELU (its tanh form)."""
    window_period: int | None = None
    """Of so many layers the last has no window, unless the file says otherwise; None: there are no windows."""
    largest: int = 0
    """The number of layers at which scores are divided by the root of D / N."""


_ARCHS = {
    "deci": _Arch(turns_neighbours=True),
    "gemma": _Arch(is_gemma=True),
    "gemma2": _Arch(is_gemma=True, window_period=2, largest=46),
    "gemma3": _Arch(is_gemma=True, window_period=6, largest=62),
    "llama": _Arch(turns_neighbours=True),
    "olmo2": _Arch(),
    "qwen2": _Arch(),
    "qwen3": _Arch(),
}


class GgufModel:
    """An opened file."""

    def __init__(self, path: Path, device: str = "cpu", window: int | None = None) -> None:
        """Read settings and the list of tensors.

        Args:
            path: the file.
            device: where to compute.
            window: how long its windows are to be; None: as it says.

        Raises:
            ExportError: if it is of an arch that is not known here.
        """
        reader = GGUFReader(path)
        self._settings = {name: field.contents() for name, field in reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._unread = set(self._tensors)
        self._device = device
        self.name = str(self._settings["general.architecture"])
        if self.name not in _ARCHS:
            raise ExportError(f"there is no reader for a GGUF file of arch {self.name!r}")
        self.arch = _ARCHS[self.name]
        if window is not None:
            self._settings[f"{self.name}.attention.sliding_window"] = window
        self.num_layers = int(self.setting("block_count"))
        if not self.of_layer("attention.head_count", 0):
            raise ExportError("llama.cpp loads no file whose first layer has no attention heads")
        if self.name == "gemma2" and not any(self.setting("attention.sliding_window_pattern", [True])):
            raise ExportError("llama.cpp aborts over a Gemma 2 without a window in any layer")

    def general(self, name: str) -> Any:
        """A setting that is not of the arch."""
        return self._settings.get(name)

    def setting(self, name: str, default: Any = None) -> Any:
        """One of the arch's settings."""
        return self._settings.get(f"{self.name}.{name}", default)

    def of_layer(self, name: str, number: int) -> int:
        """A setting that may differ from layer to layer."""
        value = self.setting(name)
        return int(value[number] if isinstance(value, list) else value)

    def tensor(self, name: str, *shape: int, rows: Tensor | None = None) -> Tensor:
        """A tensor's values, float32, or some of its rows.

        Raises:
            ExportError: if there is none, or it has another shape.
        """
        found = self._tensors.get(name)
        if found is None or tuple(reversed(found.shape.tolist())) != shape:
            has = "lacks" if found is None else f"has {found.shape.tolist()} as"
            raise ExportError(f"the GGUF file {has} the tensor {name}, which should be {list(reversed(shape))}")
        self._unread.discard(name)
        data = found.data if rows is None else found.data[rows.cpu().numpy()]
        return torch.from_numpy(dequantize(data, found.tensor_type).copy()).to(self._device)

    def if_there(self, name: str, *shape: int) -> Tensor | None:
        """A tensor that a file may do without."""
        return self.tensor(name, *shape) if name in self._tensors else None

    @torch.inference_mode()
    def logits(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """The logits [T, V] of every sequence of token ids [T].

        Raises:
            ExportError: if the file's tensors are not those that its settings ask for.
        """
        self._unread = set(self._tensors)
        width, vocab_size = int(self.setting("embedding_length")), len(self.general("tokenizer.ggml.tokens"))
        streams = [self.tensor("token_embd.weight", vocab_size, width, rows=ids_T) for ids_T in sequences]
        if self.arch.is_gemma:
            streams = [stream_TD * width**0.5 for stream_TD in streams]
        for number in range(self.num_layers):
            layer = _Layer(self, number)
            streams = [layer.forward(stream_TD) for stream_TD in streams]
        streams = [self.normed(stream_TD, self.tensor("output_norm.weight", width)) for stream_TD in streams]
        head_VD = self.if_there("output.weight", vocab_size, width)
        if head_VD is None:
            head_VD = self.tensor("token_embd.weight", vocab_size, width)
        if self._unread:
            raise ExportError(f"nothing reads the GGUF file's tensor {sorted(self._unread)[0]}")
        return [self._capped(stream_TD @ head_VD.T) for stream_TD in streams]

    def normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """RMS norm over the last dimension."""
        epsilon = float(self.setting("attention.layer_norm_rms_epsilon"))
        return functional.rms_norm(hidden, (hidden.shape[-1],), weight, epsilon)

    def _capped(self, logits_TV: Tensor) -> Tensor:
        cap = self.setting("final_logit_softcapping")
        return logits_TV if not cap else cap * torch.tanh(logits_TV / cap)


class _Layer:
    """One layer with its weights."""

    def __init__(self, model: GgufModel, number: int) -> None:
        self._model, self._number = model, number
        self._width = int(model.setting("embedding_length"))
        self._num_heads = model.of_layer("attention.head_count", number)
        self._num_kv_heads = model.of_layer("attention.head_count_kv", number)
        self._ff_width = model.of_layer("feed_forward_length", number)
        first_heads = model.of_layer("attention.head_count", 0)
        self._head_size = int(model.setting("attention.key_length", self._width // first_heads))
        self._first_heads = first_heads
        self._weights: dict[str, Tensor | None] = {}
        if self._num_heads:
            self._read_attention()
        if self._ff_width:
            self._read_feed_forward()
        factors = model.if_there("rope_freqs.weight", self._head_size // 2)
        self._factors = torch.ones(self._head_size // 2) if factors is None else factors.cpu()

    def _read(self, name: str, *shape: int) -> None:
        """A projection [out, in] and its bias."""
        self._weights[name] = self._model.tensor(f"blk.{self._number}.{name}.weight", *shape)
        self._weights[f"{name}.bias"] = self._model.if_there(f"blk.{self._number}.{name}.bias", shape[0])

    def _read_norm(self, name: str, *sizes: int) -> None:
        """A norm that a layer of this arch may do without, of one of these sizes."""
        found = self._model._tensors.get(f"blk.{self._number}.{name}.weight")
        fitting = [size for size in sizes if found is not None and found.shape.tolist() == [size]]
        size = fitting[0] if fitting else sizes[0]
        self._weights[name] = self._model.if_there(f"blk.{self._number}.{name}.weight", size)

    def _read_attention(self) -> None:
        queries, keys = self._num_heads * self._head_size, self._num_kv_heads * self._head_size
        self._read("attn_q", queries, self._width)
        self._read("attn_k", keys, self._width)
        self._read("attn_v", keys, self._width)
        self._read("attn_output", self._width, queries)
        self._read_norm("attn_norm", self._width)
        self._read_norm("post_attention_norm", self._width)
        self._read_norm("attn_q_norm", self._head_size, queries)
        self._read_norm("attn_k_norm", self._head_size, keys)

    def _read_feed_forward(self) -> None:
        self._read("ffn_gate", self._ff_width, self._width)
        self._read("ffn_up", self._ff_width, self._width)
        self._read("ffn_down", self._width, self._ff_width)
        self._read_norm("ffn_norm", self._width)
        self._read_norm("post_ffw_norm", self._width)

    def forward(self, stream_TD: Tensor) -> Tensor:
        """The stream after this layer."""
        if not self._ff_width:
            return stream_TD  # as llama.cpp has it: the attention's output is not used
        if self._num_heads:
            attended_TD = self._attend(self._normed("attn_norm", stream_TD))
            stream_TD = stream_TD + self._normed("post_attention_norm", attended_TD)
        fed_TD = self._feed(self._normed("ffn_norm", stream_TD))
        return stream_TD + self._normed("post_ffw_norm", fed_TD)

    def _normed(self, name: str, hidden: Tensor) -> Tensor:
        weight = self._weights[name]
        return hidden if weight is None else self._model.normed(hidden, weight)

    def _projected(self, name: str, hidden: Tensor) -> Tensor:
        weight = self._weights[name]
        assert weight is not None
        return functional.linear(hidden, weight, self._weights[f"{name}.bias"])

    def _feed(self, hidden_TD: Tensor) -> Tensor:
        gate = self._projected("ffn_gate", hidden_TD)
        gate = functional.gelu(gate, approximate="tanh") if self._model.arch.is_gemma else functional.silu(gate)
        return self._projected("ffn_down", gate * self._projected("ffn_up", hidden_TD))

    def _attend(self, hidden_TD: Tensor) -> Tensor:
        queries_NTH = self._heads("attn_q", hidden_TD)
        keys_KTH, values_KTH = self._heads("attn_k", hidden_TD), self._heads("attn_v", hidden_TD)
        shared = self._num_heads // self._num_kv_heads
        keys_NTH, values_NTH = (heads.repeat_interleave(shared, dim=0) for heads in (keys_KTH, values_KTH))
        scores_NTT = queries_NTH @ keys_NTH.transpose(1, 2) / math.sqrt(self._score_divisor)
        if cap := self._model.setting("attn_logit_softcapping"):
            scores_NTT = cap * torch.tanh(scores_NTT / cap)
        ages_TT = torch.arange(len(hidden_TD))[:, None] - torch.arange(len(hidden_TD))
        hidden_TT = (ages_TT < 0) | (ages_TT >= self._window(len(hidden_TD)))
        weights_NTT = scores_NTT.masked_fill(hidden_TT.to(scores_NTT.device), -torch.inf).softmax(dim=-1)
        return self._projected("attn_output", (weights_NTT @ values_NTH).transpose(0, 1).flatten(1))

    def _heads(self, name: str, hidden_TD: Tensor) -> Tensor:
        """Queries, keys or values by head [heads, T, H]; queries and keys normed and turned."""
        flat = self._projected(name, hidden_TD)
        norm = None if name == "attn_v" else self._weights[f"{name}_norm"]
        if norm is not None and norm.shape[0] != self._head_size:  # one norm over all heads
            flat, norm = self._model.normed(flat, norm), None
        heads = flat.unflatten(1, (-1, self._head_size)).transpose(0, 1)
        heads = heads if norm is None else self._model.normed(heads, norm)
        return heads if name == "attn_v" else self._turned(heads)

    def _turned(self, heads: Tensor) -> Tensor:
        """Rotary positions [heads, T, H]."""
        size, has_window = self._head_size, self._is_windowed
        theta = float(self._model.setting("rope.freq_base", 10000.0))
        factor = float(self._model.setting("rope.scaling.factor", 1.0))
        if has_window:
            # Gemma 2's layers with a window are as the others, Gemma 3's have settings of their own.
            default = theta if self._model.name == "gemma2" else 10000.0
            theta = float(self._model.setting("rope.freq_base_swa", default))
            factor = factor if self._model.name == "gemma2" else 1.0
        rates = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size) / self._factors
        angles = (torch.arange(heads.shape[1])[:, None] / factor * rates).to(heads.device)
        cosines, sines = angles.cos().float(), angles.sin().float()
        if self._model.arch.turns_neighbours:
            first, second = heads[..., 0::2], heads[..., 1::2]
        else:
            first, second = heads.chunk(2, dim=-1)
        turned = first * cosines - second * sines, second * cosines + first * sines
        return torch.stack(turned, dim=-1).flatten(-2) if self._model.arch.turns_neighbours else torch.cat(turned, -1)

    @property
    def _is_windowed(self) -> bool:
        period = self._model.arch.window_period
        if period is None or (self._model.name == "gemma3" and not self._model.setting("attention.sliding_window")):
            return False
        pattern = self._model.setting("attention.sliding_window_pattern", period)
        return bool(pattern[self._number]) if isinstance(pattern, list) else self._number % pattern < pattern - 1

    def _window(self, num_tokens: int) -> int:
        """How many tokens, itself among them, a token sees."""
        return int(self._model.setting("attention.sliding_window", 4096)) if self._is_windowed else num_tokens

    @property
    def _score_divisor(self) -> int:
        is_largest = self._model.num_layers == self._model.arch.largest
        return self._width // self._first_heads if is_largest else self._head_size
