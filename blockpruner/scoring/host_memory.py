"""Page-locked host memory beside a GPU: copies to and from it run while the GPU computes.

Buffers are registered when they are first needed, in the size that is needed, and used again. (torch's own pinned
allocator rounds sizes up to powers of two, which for a large model's weights can double them.)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Memory of this machine that is free or can be freed, as the kernel estimates it, within the container's limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(free, _left_in_container(free))


def _left_in_container(otherwise: int) -> int:
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return max(0, int(limit) - int(used))
    except (OSError, ValueError):  # no such limit: no file, or "max"
        return otherwise


class PinnedMemoryError(RuntimeError):
    """The system gives no more page-locked memory."""


class PinnedBuffer:
    """Some page-locked bytes; unlocked when the last reference goes."""

    def __init__(self, num_bytes: int) -> None:
        """Register `num_bytes` of new memory with CUDA.

        Raises:
            PinnedMemoryError: if there is none.
        """
        self._is_registered = False
        self.bytes = torch.empty(num_bytes, dtype=torch.uint8)
        status = int(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), num_bytes, 0))
        if status:
            raise PinnedMemoryError(f"no {num_bytes} bytes of page-locked memory (CUDA error {status})")
        self._is_registered = True

    def __del__(self) -> None:
        if self._is_registered:
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

    def __init__(self, device: torch.device, limit_bytes: int) -> None:
        """Serve this GPU with so many bytes of the host's memory at most."""
        self._device = device
        self._limit_bytes = limit_bytes
        self._registered_bytes = 0
        self._stream = torch.cuda.Stream(device)
        self._unused: list[PinnedBuffer] = []

    def store(self, tensor: Tensor) -> HostCopy:
        """Begin to copy a tensor to the host; it must not be changed in place afterwards.

        Raises:
            PinnedMemoryError: if the limit, or the system, leaves no room.
        """
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

    def finish(self) -> None:
        """Wait until no copy is under way, so that buffers may go."""
        torch.cuda.synchronize(self._device)

    def _buffer(self, num_bytes: int) -> PinnedBuffer:
        fitting = [buffer for buffer in self._unused if num_bytes <= buffer.bytes.nbytes <= 2 * num_bytes]
        if fitting:
            buffer = min(fitting, key=lambda each: each.bytes.nbytes)
            self._unused.remove(buffer)
            return buffer
        if self._registered_bytes + num_bytes > self._limit_bytes and self._unused:
            self.finish()
            self._registered_bytes -= sum(buffer.bytes.nbytes for buffer in self._unused)
            self._unused.clear()
        if self._registered_bytes + num_bytes > self._limit_bytes:
            raise PinnedMemoryError(f"snapshots may take {self._limit_bytes} bytes of the host's memory, and do")
        self._registered_bytes += num_bytes
        return PinnedBuffer(num_bytes)
