"""How a sweep is cut to fit the memory that it may use. Numbers in, numbers out; asks no device.

A plan decides which tensors are batched together, and so the last bits of the scores: a search keeps its plan from
beginning to end, also when it is interrupted.

Sizes are estimates; where one is too low the device says so, and the plan shrinks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

MICRO_BATCHES = 8
"""A large step has at least so many, where there are so many sequences: each is a checkpoint and a report."""


@dataclass(frozen=True)
class SweepShape:
    """What is to be computed."""

    num_sequences: int
    sequence_length: int
    num_candidates: int
    """Branches at the end of a sweep, at most."""
    hidden_bytes: int
    """Of one token's hidden state."""
    working_bytes: int
    """Of one token inside a unit, at most: projections and what lies between them."""
    vocab_size: int
    flops_per_sequence: float
    """Of a whole sweep."""

    @property
    def stream_bytes(self) -> int:
        """Of one sequence's hidden states."""
        return self.sequence_length * self.hidden_bytes


@dataclass(frozen=True)
class Machine:
    """What a kind of device likes, and how much memory a sweep may use."""

    usable_bytes: int
    """On the device, beside the weights."""
    host_bytes: int
    """On the host, for snapshots; 0 where the device is the host."""
    chunk_bytes: int
    """Hidden states that run as one batch: what keeps its units busy, or fits its caches."""
    logit_elements: int
    """Logits at one time."""
    micro_batch_flops: float
    """A micro-batch of less work than this costs more to begin than it is worth."""


CUDA_CHUNK_BYTES = 2**26
"""About the second-level cache of a Hopper GPU: larger batches were slower there (H200, 2026-11-24)."""
CUDA_LOGIT_ELEMENTS = 2**28
CUDA_MICRO_BATCH_FLOPS = 1e15
CPU_CHUNK_BYTES = 2**22
CPU_LOGIT_ELEMENTS = 2**23
CPU_MICRO_BATCH_FLOPS = 1e11
_FEW_BYTES = 2**30
"""Snapshots of less than this are given up, not halved, when memory is short."""
_LOGIT_BYTES = 12
"""Of one logit while its loss is computed: itself, in float32, and one temporary."""


class SweepPlan(BaseModel):
    """A cut that fits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    micro_batch: PositiveInt
    """Sequences that go through the network together."""
    branches_per_chunk: PositiveInt
    """Branches of them that run as one batch."""
    logit_elements: PositiveInt
    """Logits that exist at one time."""
    snapshot_bytes: NonNegativeInt
    """Memory of all snapshots, at most."""
    snapshots_on_host: bool = False

    def smaller(self, snapshots_held: int) -> SweepPlan | None:
        """The next plan to try when the device had too little memory; None when there is none.

        Args:
            snapshots_held: bytes of the device's memory that snapshots took when it ran out.
        """
        if self.branches_per_chunk == 1 and self.micro_batch == 1 and self.logit_elements == 1:
            return None
        if snapshots_held > 0:
            # Changes no batch, and so no bit of any score.
            return self.model_copy(update={"snapshot_bytes": snapshots_held // 2 if snapshots_held > _FEW_BYTES else 0})
        chunk = self.branches_per_chunk // 2
        return self.model_copy(
            update={
                "micro_batch": self.micro_batch if chunk else max(1, self.micro_batch // 2),
                "branches_per_chunk": max(1, chunk),
                "logit_elements": max(1, self.logit_elements // 2),
            }
        )


def plan_sweep(shape: SweepShape, machine: Machine, micro_batch: int | None = None) -> SweepPlan:
    """Choose micro-batch, chunks and snapshots; `micro_batch`, if given, is taken as it is."""
    usable = machine.usable_bytes
    front_bytes = (shape.num_candidates + 1) * shape.stream_bytes
    if micro_batch is None:
        micro_batch = _micro_batch(shape, machine, fitting=max(1, int(0.35 * usable) // front_bytes))
    token_bytes = max(shape.hidden_bytes, 1)
    chunk_tokens = min(machine.chunk_bytes // token_bytes, int(0.2 * usable) // shape.working_bytes)
    logit_elements = max(1, min(machine.logit_elements, int(0.05 * usable) // _LOGIT_BYTES))
    # The front and the chunk that takes its next step; what a unit works with; logits; and room for fragments.
    working = chunk_tokens * (shape.working_bytes + 2 * token_bytes) + logit_elements * _LOGIT_BYTES
    left = max(0, int(0.92 * usable) - micro_batch * front_bytes - working)
    on_host = machine.host_bytes > 2 * left
    return SweepPlan(
        micro_batch=micro_batch,
        branches_per_chunk=max(1, chunk_tokens // (micro_batch * shape.sequence_length)),
        logit_elements=logit_elements,
        snapshot_bytes=machine.host_bytes if on_host else left,
        snapshots_on_host=on_host,
    )


def _micro_batch(shape: SweepShape, machine: Machine, fitting: int) -> int:
    """Sequences of a micro-batch: enough to be worth the start, few enough to fit, and if possible all of one size."""
    worth = math.ceil(machine.micro_batch_flops / max(1.0, shape.flops_per_sequence))
    # One branch fills a chunk where that leaves some micro-batches: then all batches are of one size.
    filling = min(machine.chunk_bytes // shape.stream_bytes, math.ceil(shape.num_sequences / 4))
    wanted = max(math.ceil(shape.num_sequences / MICRO_BATCHES), worth, filling)
    most = max(1, min(wanted, fitting, shape.num_sequences))
    return next(
        (size for size in range(most, most // 2, -1) if shape.num_sequences % size == 0),
        math.ceil(shape.num_sequences / math.ceil(shape.num_sequences / most)),
    )
