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

TOKENS = tiny_token_ids(5, 12, seed=4)
NUM_LAYERS = 10
NUM_BLOCKS = 16
NUM_KILLS = 20
UPDATE_S = 0.01


class SlowScorer:
    """A sweep that notes every micro-batch in a file, and rests after it, so that kills fall within steps."""

    def __init__(self, scorer: SweepScorer, notes: Path) -> None:
        self._scorer, self._notes = scorer, notes
        self.num_sequences = scorer.num_sequences
        self.meter = scorer.meter
        self.dense_nll = scorer.dense_nll

    def fill(self, removed: tuple[Block, ...], table: ScoreTable, on_update: TableCallback) -> None:
        def rested(table: ScoreTable) -> None:
            with self._notes.open("a") as file:
                file.write(".")
            on_update(table)
            time.sleep(UPDATE_S)

        self._scorer.fill(removed, table, rested)


def search(folder: Path) -> tuple[SearchStep, ...]:
    model = tiny_model(num_hidden_layers=NUM_LAYERS)
    scorer = sweep_scorer(model, TOKENS, micro_batch=1, snapshot_bytes=10**6)
    sizes = block_sizes(row_of(model), model)
    journal = SearchJournal(folder, "0" * 64, partial_interval_s=0)
    slow = SlowScorer(scorer, folder / "computed")
    return GreedySearch(slow, sizes, num_parameters(model), journal).run(SearchTarget(num_blocks=NUM_BLOCKS))


def what_was_found(steps: tuple[SearchStep, ...]) -> list[str]:
    return [step.model_dump_json(exclude={"seconds", "work_saved"}) for step in steps]


def killed_after(folder: Path, seconds: float) -> None:
    """Search in a process of its own and kill it at work."""
    child = os.fork()
    if child == 0:
        try:
            search(folder)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it ended before it was killed"


def test_a_search_killed_twenty_times_within_its_steps_ends_with_the_same_bits(tmp_path: Path) -> None:
    undisturbed = search(tmp_path / "undisturbed")
    needed = NUM_BLOCKS * len(TOKENS)
    assert (tmp_path / "undisturbed" / "computed").stat().st_size == needed
    draw = random.Random(7)
    folder = tmp_path / "killed"
    within_a_step = 0
    for _ in range(NUM_KILLS):
        killed_after(folder, draw.uniform(2, 6) * UPDATE_S)
        within_a_step += (folder / "partial.safetensors").exists()
    assert within_a_step >= NUM_KILLS // 2
    assert what_was_found(search(folder)) == what_was_found(undisturbed)
    # It went on inside the steps: a kill costs no more than the micro-batch that was under way.
    assert (folder / "computed").stat().st_size <= needed + NUM_KILLS
