"""A search is killed (SIGKILL, nothing is cleaned up) within its steps, again and again, and ends as if undisturbed."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from blockpruner.architectures import block_sizes, num_parameters
from blockpruner.blocks import Block
from blockpruner.journal import SearchJournal
from blockpruner.scoring.interface import TableCallback
from blockpruner.scoring.sweep import SweepScorer
from blockpruner.scoring.table import ScoreTable
from blockpruner.search import GreedySearch, SearchTarget
from blockpruner.trace import SearchStep
from tests.scorers import row_of, sweep_scorer
from tests.tiny_models import tiny_model, tiny_token_ids
from tests.unit.child_processes import wait_for

TOKENS = tiny_token_ids(5, 12, seed=4)
NUM_LAYERS = 10
NUM_BLOCKS = 16
NUM_KILLS = 20
MOST_AT_ONCE = 3
"""Micro-batches between two kills, at most: so many, and the search is not over before the last kill."""
MICRO_BATCH_S = 0.01
"""About what one takes; the rest of the moment is chance."""


class NotingScorer:
    """A sweep that notes every micro-batch in a file before it is kept; after `most` of them it waits to be killed."""

    def __init__(self, scorer: SweepScorer, notes: Path, most: int | None) -> None:
        self._scorer, self._notes, self._left = scorer, notes, most
        self.num_sequences = scorer.num_sequences
        self.meter = scorer.meter
        self.dense_nll = scorer.dense_nll

    def fill(self, removed: tuple[Block, ...], table: ScoreTable, on_update: TableCallback) -> None:
        def noted(table: ScoreTable) -> None:
            with self._notes.open("a") as file:
                file.write(".")
            on_update(table)
            if self._left is not None:
                self._left -= 1
                while self._left <= 0:
                    time.sleep(1)

        self._scorer.fill(removed, table, noted)


def search(folder: Path, most: int | None = None) -> tuple[SearchStep, ...]:
    model = tiny_model(num_hidden_layers=NUM_LAYERS)
    scorer = sweep_scorer(model, TOKENS, micro_batch=1, snapshot_bytes=10**6)
    sizes = block_sizes(row_of(model), model)
    journal = SearchJournal(folder, "0" * 64, partial_interval_s=0)
    noting = NotingScorer(scorer, folder / "computed", most)
    return GreedySearch(noting, sizes, num_parameters(model), journal).run(SearchTarget(num_blocks=NUM_BLOCKS))


def what_was_found(steps: tuple[SearchStep, ...]) -> list[str]:
    return [step.model_dump_json(exclude={"seconds", "work_saved"}) for step in steps]


def num_computed(folder: Path) -> int:
    notes = folder / "computed"
    return notes.stat().st_size if notes.exists() else 0


def killed_at_work(folder: Path, draw: random.Random) -> None:
    """Search in a process of its own and kill it as it goes on from a micro-batch; it cannot come to its end."""
    before, after_so_many = num_computed(folder), draw.randint(1, MOST_AT_ONCE)
    child = os.fork()
    if child == 0:
        try:
            search(folder, MOST_AT_ONCE)
        finally:
            os._exit(1)
    wait_for(lambda: num_computed(folder) >= before + after_so_many)
    time.sleep(draw.uniform(0, MICRO_BATCH_S))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it failed before it was killed"


def test_a_search_killed_twenty_times_within_its_steps_ends_with_the_same_bits(tmp_path: Path) -> None:
    undisturbed = search(tmp_path / "undisturbed")
    needed = NUM_BLOCKS * len(TOKENS)
    assert num_computed(tmp_path / "undisturbed") == needed
    assert needed > NUM_KILLS * MOST_AT_ONCE
    draw = random.Random(7)
    folder = tmp_path / "killed"
    within_a_step = 0
    for _ in range(NUM_KILLS):
        killed_at_work(folder, draw)
        within_a_step += (folder / "partial.safetensors").exists()
    assert within_a_step >= NUM_KILLS // 2
    assert what_was_found(search(folder)) == what_was_found(undisturbed)
    # It went on inside the steps: a kill costs no more than the micro-batch that was under way.
    assert num_computed(folder) <= needed + NUM_KILLS
