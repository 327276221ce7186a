"""How a sweep is cut: within memory, of equal batches, smaller when it must be. How memory is written, work counted."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockpruner.blocks import all_blocks, mha, mlp
from blockpruner.errors import ConfigurationError
from blockpruner.memory_size import parse_memory_size
from blockpruner.scoring.decoder import Decoder
from blockpruner.scoring.plan import Machine, SweepCut, SweepPlan, SweepShape, plan_sweep
from blockpruner.scoring.work import Costs, Meter
from tests.scorers import row_of
from tests.tiny_models import tiny_model

GIB = 2**30
LLAMA_2_7B = SweepShape(
    num_sequences=18,
    sequence_length=2048,
    num_candidates=64,
    hidden_bytes=8192,
    working_bytes=137_000,
    vocab_size=32000,
    flops_per_sequence=1e15,
)


def gpu(usable: int, host: int = 0) -> Machine:
    return Machine(usable, host, chunk_bytes=2**26, logit_elements=2**28, micro_batch_flops=1e15)


def needed(shape: SweepShape, plan: SweepPlan) -> int:
    """Bytes of the front, of a chunk at work, of logits and of snapshots on the device."""
    cut = plan.cut
    tokens = cut.micro_batch * shape.sequence_length
    front = (shape.num_candidates + 1) * tokens * shape.hidden_bytes
    chunk = cut.branches_per_chunk * tokens * shape.working_bytes
    return front + chunk + 12 * cut.logit_elements + (0 if plan.snapshots_on_host else plan.snapshot_bytes)


def test_a_7b_on_a_large_gpu() -> None:
    plan = plan_sweep(LLAMA_2_7B, gpu(120 * GIB))
    assert 18 % plan.cut.micro_batch == 0, "all batches of one size"
    assert 18 // plan.cut.micro_batch * 2 >= 8, "several micro-batches: each is a checkpoint"
    assert plan.snapshot_bytes > 90 * GIB
    assert not plan.snapshots_on_host


def test_snapshots_go_to_the_host_where_the_device_has_no_room() -> None:
    plan = plan_sweep(LLAMA_2_7B, gpu(5 * GIB, host=60 * GIB))
    assert (plan.snapshots_on_host, plan.snapshot_bytes) == (True, 60 * GIB)
    assert not plan_sweep(LLAMA_2_7B, gpu(120 * GIB, host=60 * GIB)).snapshots_on_host


def test_short_sequences_fill_a_chunk_and_leave_some_micro_batches() -> None:
    short = dataclasses.replace(LLAMA_2_7B, num_sequences=80, sequence_length=8, flops_per_sequence=1e14)
    assert plan_sweep(short, gpu(100 * GIB)).cut.micro_batch == 20


@given(st.integers(1, 40), st.integers(8, 4096), st.floats(1.5, 200), st.integers(1, 300))
def test_every_plan_fits(num_sequences: int, length: int, gib: float, num_candidates: int) -> None:
    shape = SweepShape(num_sequences, length, num_candidates, 8192, 137_000, 32000, 1e14)
    usable = int(gib * GIB)
    plan = plan_sweep(shape, gpu(usable))
    assert 1 <= plan.cut.micro_batch <= num_sequences
    if plan.cut.micro_batch > 1:  # one sequence whose front is too large is tried, and shrinks when the device says so
        assert needed(shape, plan) <= usable


def test_a_batch_size_and_a_cut_are_taken_as_they_are() -> None:
    assert plan_sweep(LLAMA_2_7B, gpu(100 * GIB), micro_batch=5).cut.micro_batch == 5
    cut = SweepCut(micro_batch=7, branches_per_chunk=3, logit_elements=99_999)
    assert plan_sweep(LLAMA_2_7B, gpu(100 * GIB), cut=cut).cut == cut


def test_where_layers_are_compiled_batches_have_few_sizes() -> None:
    short = dataclasses.replace(LLAMA_2_7B, sequence_length=64)
    machine = gpu(100 * GIB)
    assert plan_sweep(short, machine, micro_batch=1).cut.branches_per_chunk > 64
    assert plan_sweep(short, dataclasses.replace(machine, compiles=True), micro_batch=1).cut.branches_per_chunk == 4
    assert (
        plan_sweep(LLAMA_2_7B, machine).cut == plan_sweep(LLAMA_2_7B, dataclasses.replace(machine, compiles=True)).cut
    )


def test_too_little_memory_is_one_clear_line() -> None:
    with pytest.raises(ConfigurationError, match="--memory-budget") as caught:
        plan_sweep(LLAMA_2_7B, gpu(-5 * GIB))
    assert "\n" not in str(caught.value)


def test_a_plan_shrinks_to_the_smallest_and_gives_up_snapshots_first() -> None:
    plan: SweepPlan | None = plan_sweep(LLAMA_2_7B, gpu(100 * GIB))
    assert plan is not None
    fewer = plan.smaller(8 * GIB, 32000)
    assert fewer == SweepPlan(plan.cut, 4 * GIB)
    assert plan.smaller(1000, 32000) == SweepPlan(plan.cut, 0)
    plans = []
    while plan is not None:
        plans.append(plan.cut)
        plan = plan.smaller(0, 32000)
    assert plans[-1] == SweepCut(micro_batch=1, branches_per_chunk=1, logit_elements=32000)
    assert len(plans) < 20
    for before, after in pairwise(plans):
        assert before != after
        assert after.micro_batch <= before.micro_batch
        assert after.logit_elements <= before.logit_elements


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("8GiB", 8 * GIB), ("80 GB", 80 * 10**9), ("1.5gib", 3 * 2**29), ("512MB", 512 * 10**6), (" 7 KiB ", 7 * 1024)],
)
def test_amounts_of_memory(text: str, num_bytes: int) -> None:
    assert parse_memory_size(text) == num_bytes


@pytest.mark.parametrize("text", ["8", "", "GiB", "-1GB", "0GiB", "1e3MB", "8 Gibibytes", "8GiB more", "\u0661GB"])
def test_no_amounts_of_memory(text: str) -> None:
    with pytest.raises(ConfigurationError, match="8GiB") as caught:
        parse_memory_size(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["2000000TB", "9" * 400 + "GB"])
def test_more_memory_than_any_device_has(text: str) -> None:
    with pytest.raises(ConfigurationError, match="than any device has") as caught:
        parse_memory_size(text)
    assert len(str(caught.value)) < 200


def test_the_work_of_a_sweep_is_that_of_its_trunk_and_branches() -> None:
    """Counted by hand: before unit u the trunk and u branches, and a head for every branch."""
    model = tiny_model()
    architecture = row_of(model)
    costs = Costs.of(architecture, model)
    attention, feed_forward = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 32), 2 * (3 * 48 * 32 + 32)
    assert costs.blocks == {mha(i): attention for i in range(4)} | {mlp(i): feed_forward for i in range(4)}
    assert costs.head == 2 * 128 * 32
    assert costs.forward((mha(1), mlp(3))) == 3 * (attention + feed_forward) + costs.head
    units = Decoder(architecture, model, 8).units
    sizes = [attention, feed_forward] * 4
    walk = costs.walk(units, (), all_blocks(4))
    assert walk == [sum((1 + i) * sizes[i] for i in range(unit)) for unit in range(8)] + [
        sum((1 + i) * size for i, size in enumerate(sizes)) + 8 * costs.head
    ]
    without = costs.walk(units, (mlp(0),), [block for block in all_blocks(4) if block != mlp(0)])
    assert without[2] == without[1] == attention


def test_a_meter_tells_speed_and_what_was_saved() -> None:
    meter = Meter(peak=1e12)
    earlier = Meter()
    meter.flops, meter.flops_saved, meter.seconds = 3e12, 1e12, 6.0
    assert meter.share_saved_since(earlier) == 0.25
    assert meter.flops_per_s == 5e11
    assert meter.mfu == 0.5
    assert Meter().mfu is None
    assert not math.isnan(Meter().flops_per_s)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(("flops", "size"), [(1e15, 5), (4e14, 10), (1e16, 1)])
def test_however_many_sequences_there_are_a_micro_batch_is_kept_soon(flops: float, size: int) -> None:
    shape = dataclasses.replace(LLAMA_2_7B, num_sequences=1000, flops_per_sequence=flops)
    assert plan_sweep(shape, gpu(1000 * GIB)).cut.micro_batch == size
    short = dataclasses.replace(shape, sequence_length=8)  # of which many would fill a chunk
    assert plan_sweep(short, gpu(1000 * GIB)).cut.micro_batch == size


@given(st.integers(1, 60), st.integers(2, 20))
def test_workers_get_shares_as_equal_as_can_be(num_sequences: int, num_workers: int) -> None:
    shape = dataclasses.replace(LLAMA_2_7B, num_sequences=num_sequences)
    size = plan_sweep(shape, gpu(1000 * GIB), num_workers=num_workers).cut.micro_batch

    def longest(size: int) -> int:
        """Micro-batches dealt out one by one."""
        hands = [0] * num_workers
        for index in range(0, num_sequences, size):
            hands[index // size % num_workers] += size
        return max(hands)

    most = plan_sweep(shape, gpu(1000 * GIB)).cut.micro_batch
    assert longest(size) == min(longest(other) for other in range(1, max(most, size) + 1))


def test_a_cut_that_is_given_is_kept_for_any_number_of_workers() -> None:
    cut = plan_sweep(LLAMA_2_7B, gpu(120 * GIB)).cut
    assert plan_sweep(LLAMA_2_7B, gpu(120 * GIB), cut=cut, num_workers=16).cut == cut
    assert plan_sweep(LLAMA_2_7B, gpu(120 * GIB), num_workers=8).cut.micro_batch == 3


def test_the_batch_of_a_sequence_and_the_common_cut() -> None:
    cut = SweepCut(micro_batch=3, branches_per_chunk=9, logit_elements=100)
    assert [cut.batch_of(index, 8) for index in (0, 2, 3, 7)] == [slice(0, 3), slice(0, 3), slice(3, 6), slice(6, 8)]
    other = SweepCut(micro_batch=4, branches_per_chunk=2, logit_elements=200)
    assert cut.within(other) == other.within(cut)
    assert cut.within(other) == SweepCut(micro_batch=3, branches_per_chunk=2, logit_elements=100)
