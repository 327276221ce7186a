"""Page-locked host memory beside a GPU: copies to and from it run while the GPU computes.

Buffers are registered when they are first needed, in the size that is needed, and used again. (torch's own pinned
allocator rounds sizes up to powers of two, which for a large model's weights can double them.)
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor


def available_bytes() -> int:
    """Memory of this machine that is free or can be freed, as the kernel estimates it."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class PinnedBuffer:
    """Some page-locked bytes; unlocked when the last reference goes."""

    def __init__(self, num_bytes: int) -> None:
        """Register `num_bytes` of new memory with CUDA."""
        self.bytes = torch.empty(num_bytes, dtype=torch.uint8)
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), num_bytes, 0)))

    def __del__(self) -> None:
        torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())


@dataclass(frozen=True)
class HostCopy:
    """A tensor's content on the host."""

    buffer: PinnedBuffer
    like: Tensor
    """Shape and dtype, without data (on the meta device)."""

    @property
    def values(self) -> Tensor:
        """The content, as a view of the buffer."""
        return self.buffer.bytes[: self.like.nbytes].view(self.like.dtype).view(self.like.shape)


class HostCopies:
    """Copies tensors of one GPU to the host and back, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        """Serve this GPU."""
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._unused: list[PinnedBuffer] = []

    def store(self, tensor: Tensor) -> HostCopy:
        """Begin to copy a tensor to the host; it must not be changed in place afterwards."""
        copy = HostCopy(self._buffer(tensor.nbytes), torch.empty_like(tensor, device="meta"))
        # After all that was asked of the GPU so far: it computes the tensor, and may still read the buffer.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            copy.values.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        return copy

    def load(self, copy: HostCopy) -> Tensor:
        """A tensor on the GPU with the content of a copy."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return copy.values.to(self._device, non_blocking=True)

    def give_back(self, copy: HostCopy) -> None:
        """A copy is no longer needed; its buffer may be used again."""
        self._unused.append(copy.buffer)

    def _buffer(self, num_bytes: int) -> PinnedBuffer:
        fitting = [buffer for buffer in self._unused if num_bytes <= buffer.bytes.nbytes <= 2 * num_bytes]
        if not fitting:
            return PinnedBuffer(num_bytes)
        buffer = min(fitting, key=lambda each: each.bytes.nbytes)
        self._unused.remove(buffer)
        return buffer
