"""The demo model's pruning order: a change of numerics must show here, a refactor must not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blockpruner.architectures import architecture_of, block_sizes, num_parameters
from blockpruner.calibration import cut_into_sequences
from blockpruner.checkpoint import Checkpoint
from blockpruner.journal import SearchJournal
from blockpruner.loading import load_model, load_tokenizer
from blockpruner.scoring.build import build_scorer
from blockpruner.scoring.metrics import metric_of
from blockpruner.scoring.settings import MetricName, ScorerSettings
from blockpruner.search import GreedySearch, SearchTarget

DEMO = Path(__file__).parents[2] / "data" / "demo"
GOLDEN = Path(__file__).with_name("demo_order.json")
NUM_SEQUENCES, SEQUENCE_LENGTH, NUM_BLOCKS = 8, 128, 8


@pytest.mark.parametrize("metric", ["perplexity", "kl"])
def test_the_order_and_its_scores(tmp_path: Path, metric: MetricName) -> None:
    checkpoint = Checkpoint.open(str(DEMO / "model"))
    rows = [json.loads(line)["text"] for line in (DEMO / "calibration.jsonl").read_text().splitlines()]
    token_ids_BT = cut_into_sequences(rows, load_tokenizer(checkpoint), SEQUENCE_LENGTH)[:NUM_SEQUENCES]
    model = load_model(checkpoint, device="cpu", dtype="float32")
    architecture = architecture_of(checkpoint.model_type).for_config(model.config)
    scorer = build_scorer(architecture, model, token_ids_BT, "cpu", metric_of(metric), ScorerSettings())
    sizes, journal = block_sizes(architecture, model), SearchJournal(tmp_path, "0" * 64)
    search = GreedySearch(scorer, sizes, num_parameters(model), journal, metric=metric_of(metric))
    steps = search.run(SearchTarget(num_blocks=NUM_BLOCKS))
    golden = json.loads(GOLDEN.read_text())[metric]
    assert [str(step.block) for step in steps] == golden["order"]
    assert [step.score for step in steps] == pytest.approx(golden["scores"], rel=1e-5)
