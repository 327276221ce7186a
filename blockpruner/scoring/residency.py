"""Where the decoder layers' weights are while a sweep needs them: all on the device, or fetched layer by layer.

A model that is larger than the GPU's memory lies in page-locked host memory. A micro-batch runs the layers in order,
so while one layer computes, the next one's weights are copied on a stream of their own. The embedding, the final norm
and the head stay on the device.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from blockpruner.scoring.host_memory import PinnedBuffer

NUM_SLOTS = 2
"""Layers whose weights are on the device at one time: one computes, the next one arrives."""


class LayerResidency(Protocol):
    """Makes a layer's weights present before it runs."""

    def expect(self, layer_indices: tuple[int, ...]) -> None:
        """The order in which layers will be asked for from now on."""
        ...

    def ensure(self, layer_index: int) -> None:
        """Return once this layer can be run."""
        ...


class Resident:
    """Every layer is always there."""

    def expect(self, layer_indices: tuple[int, ...]) -> None:
        """Nothing to prepare."""

    def ensure(self, layer_index: int) -> None:
        """Nothing to do."""


class _Slot:
    """Room on the device for one layer's weights, reused for layer after layer."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.layer_index: int | None = None
        self.arrived = torch.cuda.Event()
        self.free = torch.cuda.Event()


class Streamed:
    """Layers in pinned host memory, copied to one of two slots on the device before they run."""

    def __init__(self, layers: nn.ModuleList, device: torch.device) -> None:
        """Pin the layers' weights, and move everything they need to the device when they run."""
        self._device = device
        self._tensors = [list(layer.parameters()) + list(layer.buffers()) for layer in layers]
        self._buffers = [_pin(tensors) for tensors in self._tensors]
        self._hosts = [buffer.bytes for buffer in self._buffers]
        self._slots = [_Slot(max(host.numel() for host in self._hosts), device) for _ in range(NUM_SLOTS)]
        self._stream = torch.cuda.Stream(device)
        self._order: tuple[int, ...] = ()
        self._current: _Slot | None = None

    def expect(self, layer_indices: tuple[int, ...]) -> None:
        """Begin to fetch the first layer of the order."""
        self._order = layer_indices
        if layer_indices and self._fetch(layer_indices[0]) is self._current:
            self._fetch_after(layer_indices[0])

    def ensure(self, layer_index: int) -> None:
        """Wait, on the device, for this layer's weights, and begin to fetch the next one's."""
        if self._current is not None and self._current.layer_index == layer_index:
            return
        compute = torch.cuda.current_stream(self._device)
        if self._current is not None:
            self._current.free.record(compute)
        slot = self._fetch(layer_index)
        compute.wait_event(slot.arrived)
        for tensor, view in zip(
            self._tensors[layer_index], _views(self._tensors[layer_index], slot.buffer), strict=True
        ):
            tensor.data = view
        self._current = slot
        self._fetch_after(layer_index)

    def _fetch_after(self, layer_index: int) -> None:
        position = self._order.index(layer_index) if layer_index in self._order else len(self._order)
        if position + 1 < len(self._order):
            self._fetch(self._order[position + 1])

    def _fetch(self, layer_index: int) -> _Slot:
        """Copy a layer's weights to a slot that is not in use, unless they are in one."""
        for slot in self._slots:
            if slot.layer_index == layer_index:
                return slot
        slot = next(slot for slot in self._slots if slot is not self._current)
        host = self._hosts[layer_index]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.free)
            slot.buffer[: host.numel()].copy_(host, non_blocking=True)
            slot.arrived.record(self._stream)
        slot.layer_index = layer_index
        return slot


def _aligned(num_bytes: int) -> int:
    """Tensors begin at multiples of 256 bytes, as the kernels that read them expect."""
    return -(-num_bytes // 256) * 256


def _pin(tensors: list[Tensor]) -> PinnedBuffer:
    """One page-locked buffer with the bytes of all tensors, whose storage is given up."""
    buffer = PinnedBuffer(sum(_aligned(tensor.nbytes) for tensor in tensors))
    for tensor, view in zip(tensors, _views(tensors, buffer.bytes), strict=True):
        view.copy_(tensor.data)
        tensor.data = view
    return buffer


def _views(tensors: list[Tensor], buffer: Tensor) -> list[Tensor]:
    """The tensors' shapes and dtypes over consecutive parts of a buffer of bytes."""
    views, start = [], 0
    for tensor in tensors:
        views.append(buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += _aligned(tensor.nbytes)
    return views
