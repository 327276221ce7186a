"""The demo's last words: what the numbers mean, where things are, and what to try next.

Computes two yardsticks: what the frequencies of the words alone would give, and what guessing would.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from rich.console import Group, RenderableType
from rich.text import Text
from safetensors.numpy import load_file

from flows.render import number, order_line, perplexity_table, strip, task_table
from flows.summary import RunSummary
from flows.wording import count

DATA = Path(__file__).parent.parent / "data" / "demo"
"""The demo's model, texts and questions; in a clone of the repository only."""
_TEXT = "evaluation.txt"
_TASK = "demo_facts"


def demo_view(summary: RunSummary) -> RenderableType:
    """The demo's result, explained."""
    record, removed = summary.record, summary.removed
    assert record.num_layers is not None
    assert record.num_parameters is not None
    share = removed[-1].ratio if removed else 0.0
    heading = Text(
        f"\n{count(len(removed), 'block')} of {record.num_blocks_total} removed, {share:.1%} of "
        f"{record.num_parameters:,} parameters:\n"
    )
    return Group(
        heading,
        strip(record.num_layers, removed),
        Text(f"\nin this order: {order_line(removed)}\n"),
        perplexity_table(summary),
        Text(_unigram_line(summary) + "\n"),
        task_table(summary.rows.evaluations),
        Text(_chance_line() + "\n"),
        Text(_places(summary)),
    )


def unigram_perplexity(sequences: Iterable[Iterable[int]]) -> float:
    """Perplexity of the tokens that a model predicts (all but each sequence's first) under their own frequencies."""
    counts = Counter(int(token) for sequence in sequences for token in list(sequence)[1:])
    total = counts.total()
    return math.exp(-sum(n / total * math.log(n / total) for n in counts.values()))


def chance_accuracy(questions: Path) -> float:
    """What guessing gets right, on average, in a multiple-choice file."""
    rows = (json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines())
    return fmean(1 / len(row["choices"]) for row in rows)


def _unigram_line(summary: RunSummary) -> str:
    stage, dense = summary.record.stage(f"text:{_TEXT}"), summary.perplexity("dense", _TEXT)
    if stage is None or stage.artifact_path is None or dense is None:
        return ""
    tokens = load_file(summary.workspace.inside(stage.artifact_path) / "tokens.safetensors")["token_ids"]
    unigram = unigram_perplexity(tokens.tolist())
    return (
        f"A model that knows only how frequent each token is gets {number(unigram)} on {_TEXT}, "
        f"{unigram / dense:.1f} times the dense model's: it has learned."
    )


def _chance_line() -> str:
    return f"Guessing would get {chance_accuracy(DATA / 'tasks' / f'{_TASK}.jsonl'):.2f}."


def _places(summary: RunSummary) -> str:
    run_id = summary.record.run_id
    return (
        f"model:     {summary.export_path}\n"
        f"database:  {summary.workspace.database}\n\n"
        "next:      blockpruner show latest\n"
        f"           blockpruner sql \"SELECT * FROM search_steps WHERE run_id = '{run_id}'\"\n"
        "           blockpruner run demo --num-blocks 12 --name further    # and its price\n"
        "           blockpruner export latest --format gguf                # for llama.cpp; stock, decilm ...\n"
        "           blockpruner run --help                                 # your own model"
    )
