"""How a sweep is cut to fit the memory that it may use. Numbers in, numbers out; asks no device.

A cut decides which tensors are batched together, and so the last bits of the scores: a search goes on with the cut that
it was begun with, unless it is asked for another or the device has too little memory for it.

Sizes are estimates; where one is too low the device says so, and the plan shrinks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict, PositiveInt

from blockpruner.errors import ConfigurationError

MICRO_BATCHES = 8
"""A large step has at least so many, where there are so many sequences: each is a checkpoint and a report."""


_LONGEST = 5
"""A micro-batch of more than so many times the work that is worth its start would be kept too seldom, and a kill would
cost the whole of it."""


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
    compiles: bool = False
    """Whether layers are compiled, for each size of batch anew."""


CUDA_CHUNK_BYTES = 2**26
"""About the second-level cache of a Hopper GPU: larger batches were slower there (H200, 2026-11-24)."""
CUDA_LOGIT_ELEMENTS = 2**30
"""A call of the head costs a millisecond of the host's time; with fewer logits a call a GPU waits for it."""
CUDA_MICRO_BATCH_FLOPS = 1e15
_COMPILED_BRANCHES = 4
"""Branches that run as one batch, at most, where each number of them has to be compiled: two or three kernels each."""
CPU_CHUNK_BYTES = 2**22
CPU_LOGIT_ELEMENTS = 2**23
CPU_MICRO_BATCH_FLOPS = 1e11
_FEW_BYTES = 2**30
"""Snapshots of less than this are given up, not halved, when memory is short."""
_LOGIT_SHARE = 0.1
"""Of the memory that may be used, for logits, at most."""
_LOGIT_BYTES = 12
"""Of one logit while its loss is computed: itself, in float32, and one temporary."""


class SweepCut(BaseModel):
    """What is batched together. It decides the last bits of the scores, and nothing else of them."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    micro_batch: PositiveInt
    """Sequences that go through the network together."""
    branches_per_chunk: PositiveInt
    """Branches of them that run as one batch."""
    logit_elements: PositiveInt
    """Logits that exist at one time."""

    def batch_of(self, sequence_index: int, num_sequences: int) -> slice:
        """The micro-batch that a sequence belongs to."""
        start = sequence_index - sequence_index % self.micro_batch
        return slice(start, min(start + self.micro_batch, num_sequences))

    def within(self, other: SweepCut) -> SweepCut:
        """The largest cut that is nowhere larger than either."""
        return SweepCut(
            micro_batch=min(self.micro_batch, other.micro_batch),
            branches_per_chunk=min(self.branches_per_chunk, other.branches_per_chunk),
            logit_elements=min(self.logit_elements, other.logit_elements),
        )

    def smaller(self, vocab_size: int) -> SweepCut | None:
        """The next cut to try when the device had too little memory; None when there is none."""
        least = min(self.logit_elements, vocab_size)
        if self.branches_per_chunk == 1 and self.micro_batch == 1 and self.logit_elements == least:
            return None
        return SweepCut(
            micro_batch=self.micro_batch if self.branches_per_chunk > 1 else max(1, self.micro_batch // 2),
            branches_per_chunk=max(1, self.branches_per_chunk // 2),
            logit_elements=max(least, self.logit_elements // 2),
        )


@dataclass(frozen=True)
class SweepPlan:
    """A cut, and the memory for snapshots, which changes no bit."""

    cut: SweepCut
    snapshot_bytes: int
    """Memory of all snapshots, at most."""
    snapshots_on_host: bool = False

    def smaller(self, snapshots_held: int, vocab_size: int) -> SweepPlan | None:
        """The next plan to try when the device had too little memory; None when there is none.

        Args:
            snapshots_held: bytes of the device's memory that snapshots took when it ran out.
            vocab_size: logits of one token; there is no sense in fewer at a time.
        """
        if snapshots_held > 0:
            return replace(self, snapshot_bytes=snapshots_held // 2 if snapshots_held > _FEW_BYTES else 0)
        cut = self.cut.smaller(vocab_size)
        return replace(self, cut=cut) if cut else None


@dataclass(frozen=True)
class Team:
    """Those who score a search's micro-batches between them."""

    num_workers: int = 1
    num_on_machine: int = 1
    """Of them on the same machine: each may take its share of what memory is free."""


def plan_sweep(
    shape: SweepShape,
    machine: Machine,
    micro_batch: int | None = None,
    cut: SweepCut | None = None,
    num_workers: int = 1,
) -> SweepPlan:
    """Choose micro-batch, chunks and snapshots.

    Args:
        shape: what is to be computed.
        machine: what may be used.
        micro_batch: sequences of a micro-batch, taken as they are.
        cut: the cut of an interrupted search, taken as it is.
        num_workers: those who share the micro-batches; a new cut lets the one who has most have as little as can be.

    Raises:
        ConfigurationError: if there is too little memory for one sequence.
    """
    usable, front_bytes = machine.usable_bytes, (shape.num_candidates + 1) * shape.stream_bytes
    needed = 2 * shape.stream_bytes + shape.sequence_length * shape.working_bytes + shape.vocab_size * _LOGIT_BYTES
    if usable < needed:
        raise ConfigurationError(
            f"{max(0, usable):,} bytes of the device's memory are left for the search, and one sequence of "
            f"{shape.sequence_length} tokens needs {needed:,}; give a larger --memory-budget or a smaller "
            "--sequence-length"
        )
    if cut is None:
        if micro_batch is None:
            branch_bytes = shape.sequence_length * shape.working_bytes
            fitting = max(1, min(int(0.35 * usable) // front_bytes, int(0.2 * usable) // branch_bytes))
            micro_batch = _micro_batch(shape, machine, fitting, num_workers)
        chunk_tokens = min(machine.chunk_bytes // shape.hidden_bytes, int(0.2 * usable) // shape.working_bytes)
        branch_tokens = micro_batch * shape.sequence_length
        branches_per_chunk = max(1, chunk_tokens // branch_tokens)
        if machine.compiles:
            branches_per_chunk = min(branches_per_chunk, _COMPILED_BRANCHES)
        logits = min(machine.logit_elements, branches_per_chunk * branch_tokens * shape.vocab_size)
        cut = SweepCut(
            micro_batch=micro_batch,
            branches_per_chunk=branches_per_chunk,
            logit_elements=max(shape.vocab_size, min(logits, int(_LOGIT_SHARE * usable) // _LOGIT_BYTES)),
        )
    # The front and the chunk that takes its next step; what a unit works with; logits; and room for fragments.
    chunk_tokens = cut.branches_per_chunk * cut.micro_batch * shape.sequence_length
    working = chunk_tokens * (shape.working_bytes + 2 * shape.hidden_bytes) + cut.logit_elements * _LOGIT_BYTES
    left = max(0, int(0.92 * usable) - cut.micro_batch * front_bytes - working)
    on_host = machine.host_bytes > 2 * left
    return SweepPlan(cut, machine.host_bytes if on_host else left, on_host)


def _micro_batch(shape: SweepShape, machine: Machine, fitting: int, num_workers: int) -> int:
    """Sequences of a micro-batch: enough to be worth the start, at most `fitting`, and if possible all of one size."""
    flops = max(1.0, shape.flops_per_sequence)
    worth, longest = math.ceil(machine.micro_batch_flops / flops), int(_LONGEST * machine.micro_batch_flops / flops)
    # One branch fills a chunk where that leaves some micro-batches: then all batches are of one size.
    filling = min(machine.chunk_bytes // shape.stream_bytes, math.ceil(shape.num_sequences / 4))
    wanted = max(min(max(math.ceil(shape.num_sequences / MICRO_BATCHES), filling), longest), worth)
    most = max(1, min(wanted, fitting, math.ceil(shape.num_sequences / num_workers)))
    if num_workers > 1:
        return min(range(most, 0, -1), key=lambda size: _longest_share(shape.num_sequences, size, num_workers))
    return next(
        (size for size in range(most, most // 2, -1) if shape.num_sequences % size == 0),
        math.ceil(shape.num_sequences / math.ceil(shape.num_sequences / most)),
    )


def _longest_share(num_sequences: int, micro_batch: int, num_workers: int) -> int:
    """Sequences that the worker with most micro-batches scores."""
    return math.ceil(math.ceil(num_sequences / micro_batch) / num_workers) * micro_batch
