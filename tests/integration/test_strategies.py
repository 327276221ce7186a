"""Every strategy through the stages and the command line: artifacts, rows, exports, refusals."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from blockpruner.blocks import Block
from blockpruner.calibration import save_token_ids
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import ConfigurationError
from blockpruner.journal import SearchJournal
from blockpruner.progress import Progress
from blockpruner.repackable import spare_blocks
from blockpruner.strategies import STRATEGIES, LacoSettings, StrategyName
from blockpruner.trace import SearchTrace, read_trace
from flows.plan import Plan
from flows.recipe import make_recipe
from stages import export, search
from stages.contract import ArtifactRef, Runtime
from tests.integration.command_line import blockpruner
from tests.oracles import oracle_perplexity, oracle_sequence_nll
from tests.tiny_models import save_tiny_model, tiny_rows, tiny_token_ids

TOKENS = tiny_token_ids(4, 12, seed=1)
EASY = LacoSettings(layers_per_merge=2, interval=1, threshold=-0.99)
STRATEGY_NAMES: list[StrategyName] = list(STRATEGIES)


class InterruptionError(Exception):
    """Stands for a process that is killed."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> search.SearchInputs:
    folder = tmp_path_factory.mktemp("strategies")
    (tokens := folder / "tokens").mkdir()
    save_token_ids(TOKENS, tokens)
    model = save_tiny_model(folder / "model", "llama", num_hidden_layers=5)
    return search.SearchInputs(Checkpoint.open(str(model)), ArtifactRef("c" * 64, tokens))


def run(
    folder: Path, inputs: search.SearchInputs, strategy: StrategyName, state: str = "state", **more: Any
) -> tuple[search.SearchManifest, SearchTrace, Path]:
    out_dir = folder / f"out-{len(list(folder.glob('out-*')))}"
    out_dir.mkdir(parents=True)
    progress = more.pop("progress", lambda _: None)
    runtime = Runtime(state_dir=folder / state, batch_size=2, progress=progress)
    config = search.SearchConfig(strategy=strategy, laco=EASY, **{"num_blocks": 4, **more})
    return search.STAGE.run(config, inputs, out_dir, runtime), read_trace(out_dir), out_dir


def comparable(trace: SearchTrace) -> list[str]:
    return [step.model_copy(update={"seconds": 0.0, "work_saved": 0.0}).model_dump_json() for step in trace.steps]


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
def test_a_search_says_what_it_removed(tmp_path: Path, inputs: search.SearchInputs, strategy: StrategyName) -> None:
    manifest, trace, _ = run(tmp_path, inputs, strategy)
    assert trace.summary.strategy == strategy
    assert len(manifest.pruning_order) == trace.num_blocks == 4
    assert [Block(layer_index=p.layer_index, block_kind=p.block_kind) for p in manifest.pruning_order] == list(
        trace.removed()
    )
    assert manifest.num_steps == (2 if STRATEGIES[strategy].whole_layers else 4)
    assert [p.ratio for p in manifest.pruning_order][-1] == trace.steps[-1].ratio


@pytest.mark.parametrize("strategy", ["oneshot", "layers", "laco"])
def test_a_search_and_its_export_are_of_the_same_model(
    tmp_path: Path, inputs: search.SearchInputs, strategy: StrategyName
) -> None:
    """The exported model, loaded by transformers alone, has the perplexity that the search's last step says."""
    _, trace, folder = run(tmp_path, inputs, strategy)
    (out_dir := tmp_path / "export").mkdir()
    exported = export.run(
        export.ExportConfig(), export.ExportInputs(inputs.model, ArtifactRef("5" * 64, folder)), out_dir, Runtime()
    )
    assert exported.verified
    assert exported.num_blocks_removed == 4
    model = AutoModelForCausalLM.from_pretrained(out_dir / export.MODEL_FOLDER, trust_remote_code=True)
    with torch.inference_mode():
        logits = model(input_ids=TOKENS, use_cache=False).logits
    measured = oracle_perplexity(oracle_sequence_nll(logits, TOKENS))
    assert measured == pytest.approx(trace.steps[-1].perplexity, rel=1e-4)
    assert STRATEGIES[strategy].source.split(",")[0] in (out_dir / export.MODEL_FOLDER / "README.md").read_text()


@pytest.mark.parametrize("strategy", STRATEGY_NAMES)
def test_an_interrupted_search_goes_on_to_the_same_trace(
    tmp_path: Path, inputs: search.SearchInputs, strategy: StrategyName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "SearchJournal", functools.partial(SearchJournal, partial_interval_s=0))
    whole = run(tmp_path, inputs, strategy, "whole")[1]
    kills = 0
    while kills < 40:
        seen: list[Progress] = []

        def dies(report: Progress, seen: list[Progress] = seen) -> None:
            seen.append(report)
            if len(seen) == 2:
                raise InterruptionError

        try:
            resumed = run(tmp_path, inputs, strategy, progress=dies)[1]
            break
        except InterruptionError:
            kills += 1
    assert kills > 0
    assert comparable(resumed) == comparable(whole)
    shorter = run(tmp_path, inputs, strategy, num_blocks=2)[1]
    assert comparable(shorter) == comparable(whole)[: len(shorter.steps)]


def test_what_a_strategy_does_not_read_is_no_part_of_its_identity(inputs: search.SearchInputs) -> None:
    def identity(**config: Any) -> str:
        return search.STAGE.resume_fingerprint(search.SearchConfig(num_blocks=4, **config), inputs)

    for name in STRATEGIES:
        other_seed = identity(strategy=name, strategy_seed=7) != identity(strategy=name, strategy_seed=0)
        assert other_seed == (name == "random")
        other_laco = identity(strategy=name, laco=EASY) != identity(strategy=name, laco=LacoSettings())
        assert other_laco == (name == "laco")
        assert identity(strategy=name) == identity(strategy=name, strategy_seed=0, laco=LacoSettings())
    assert len({identity(strategy=name) for name in STRATEGIES}) == len(STRATEGIES)


def test_the_default_strategys_config_is_written_as_it_always_was() -> None:
    """Its fingerprints, and with them everybody's finished searches, depend on these very fields."""
    assert search.SearchConfig(num_blocks=3).model_dump(mode="json") == {
        "block_kinds": "both",
        "num_blocks": 3,
        "ratio": None,
        "dtype": "float32",
        "metric": "perplexity",
        "stock_compatible_at": None,
        "strategy": "blockpruner",
    }


def test_an_export_ends_where_a_step_does(tmp_path: Path, inputs: search.SearchInputs) -> None:
    folder = run(tmp_path, inputs, "layers")[2]
    (out_dir := tmp_path / "export").mkdir()
    ref = ArtifactRef("5" * 64, folder)
    with pytest.raises(ConfigurationError, match="steps that end at 2, 4; give one of these"):
        export.run(export.ExportConfig(num_blocks=3), export.ExportInputs(inputs.model, ref), out_dir, Runtime())
    trace = read_trace(folder)
    assert trace.removed(2) == trace.steps[0].blocks
    assert trace.removed(4) == trace.removed()


def test_a_laco_export_in_another_dtype_is_verified_against_weights_rounded_likewise(
    tmp_path: Path, inputs: search.SearchInputs
) -> None:
    folder = run(tmp_path, inputs, "laco")[2]
    (out_dir := tmp_path / "export").mkdir()
    ref = export.ExportInputs(inputs.model, ArtifactRef("5" * 64, folder))
    manifest = export.run(export.ExportConfig(dtype="bfloat16"), ref, out_dir, Runtime())
    assert manifest.verified
    merged = json.loads((out_dir / export.MODEL_FOLDER / "pruning_manifest.json").read_text())["merged_layers"]
    assert merged


@pytest.mark.parametrize("strategy", ["oneshot", "random"])
def test_removals_in_pairs_are_heeded_by_strategies_that_score_once(
    tmp_path: Path, inputs: search.SearchInputs, strategy: StrategyName
) -> None:
    trace = run(tmp_path, inputs, strategy, stock_compatible_at="4 blocks")[1]
    assert spare_blocks(5, trace.removed(), is_parallel=False) == 0
    free = run(tmp_path, inputs, strategy, "free")[1]
    assert spare_blocks(5, free.removed(), is_parallel=False) > 0, "so that it had to heed something"


def test_an_export_without_the_merges_is_refused(
    tmp_path: Path, inputs: search.SearchInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate sees what a mask alone would not: that the weights were merged."""
    from blockpruner.errors import ExportError
    from blockpruner.export.write import write_export

    folder = run(tmp_path, inputs, "laco")[2]
    (out_dir := tmp_path / "export").mkdir()
    monkeypatch.setattr(export, "write_export", lambda *args, merges, **options: write_export(*args, **options))
    with pytest.raises(ExportError, match="differs from the masked original"):
        export.run(
            export.ExportConfig(), export.ExportInputs(inputs.model, ArtifactRef("5" * 64, folder)), out_dir, Runtime()
        )


REFUSED = [
    (["--strategy", "layer", "--num-blocks", "2"], "layers"),
    (["--strategy", "layers", "--num-blocks", "3"], "even number"),
    (["--strategy", "layers", "--block-kinds", "mha", "--num-blocks", "2"], "removes whole layers"),
    (["--strategy", "shortgpt", "--metric", "kl", "--num-blocks", "2"], "importance of its own"),
    (["--strategy", "random", "--strategy-seed", "-1", "--num-blocks", "2"], "strategy_seed"),
    (["--strategy", "laco", "--laco-threshold", "1.5", "--num-blocks", "2"], "laco_threshold"),
    (["--strategy", "laco", "--laco-layers-per-merge", "9", "--num-blocks", "2"], "laco_layers_per_merge"),
    (["--strategy", "layers", "--num-blocks", "10"], "at most"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=lambda value: " ".join(value)[:40])
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, inputs: search.SearchInputs, options: list[str], words: str
) -> None:
    outcome = blockpruner("search", *arguments(tmp_path, inputs), *options)
    assert outcome.status == 2
    assert words in " ".join(outcome.stderr.split())
    assert "Traceback" not in outcome.stderr
    assert not (tmp_path / "ws" / "artifacts" / "calibrate").exists(), "before anything was computed"


def test_an_export_of_half_a_layer_is_refused_before_the_search(tmp_path: Path, inputs: search.SearchInputs) -> None:
    (text := tmp_path / "rows.txt").write_text("\n".join(tiny_rows(30)))
    settings = {"model": str(inputs.model.path), "calibration": str(text), "sequence_length": 16, "device": "cpu"}
    recipe = make_recipe(settings | {"strategy": "layers", "num_blocks": 4, "export_blocks": 3})
    with pytest.raises(ConfigurationError, match="export_blocks is 3, and strategy layers"):
        Plan.make(recipe, "export")
    Plan.make(recipe.changed({"export_blocks": 2}), "export")


def arguments(folder: Path, inputs: search.SearchInputs) -> list[str]:
    (text := folder / "rows.txt").write_text("\n".join(tiny_rows(30)))
    common = ["--model", str(inputs.model.path), "--calibration", str(text), "--num-samples", "all"]
    return [*common, "--sequence-length", "16", "--device", "cpu", "--workspace", str(folder / "ws")]


@pytest.mark.parametrize("strategy", ["layers", "shortgpt", "oneshot", "laco"])
def test_the_tables_have_a_row_for_every_block(tmp_path: Path, inputs: search.SearchInputs, strategy: str) -> None:
    easy = ["--laco-layers-per-merge", "2", "--laco-interval", "1", "--laco-threshold", "-0.9"]
    given = ["--strategy", strategy, *(easy if strategy == "laco" else []), "--num-blocks", "4", "--json"]
    told = blockpruner("search", *arguments(tmp_path, inputs), *given).json
    assert told["num_blocks_removed"] == len(told["pruning_order"]) == 4

    def rows(query: str) -> list[dict[str, Any]]:
        answer: list[dict[str, Any]] = blockpruner("sql", query, "--json", "--workspace", tmp_path / "ws").json
        return answer

    row = STRATEGIES[strategy]  # type: ignore[index]
    metric = "perplexity" if row.uses_metric else row.importance
    assert rows("SELECT strategy, metric, num_blocks_removed AS k FROM runs") == [
        {"strategy": strategy, "metric": metric, "k": 4}
    ]
    steps = rows("SELECT * FROM search_steps ORDER BY step, layer_index, block_kind")
    assert {each["strategy"] for each in steps} == {strategy}
    per_step = 2 if row.whole_layers else 1
    assert [each["step"] for each in steps] == [1 + index // per_step for index in range(4)]
    assert [each["num_blocks_removed"] for each in steps] == [per_step * each["step"] for each in steps]
    assert len({(each["layer_index"], each["block_kind"]) for each in steps}) == 4
    scores = rows("SELECT * FROM block_scores ORDER BY step")
    assert {each["block_kind"] for each in scores if each["step"] == 1} == {"mha", "mlp"}
    assert sum(each["chosen"] for each in scores) == 4
    if strategy != "layers":
        assert {each["perplexity"] is None for each in scores if each["step"] == 2 and not each["chosen"]} <= {True}
    shown = blockpruner("show", "latest", "--workspace", tmp_path / "ws")
    assert shown.status == 0
    assert strategy in shown.stdout
    pruned = next(each for each in told["perplexities"] if each["variant"] == "pruned")
    assert (pruned["num_blocks_removed"], pruned["perplexity"]) == (4, steps[-1]["perplexity"])


def test_a_run_is_exported_with_its_merged_weights(tmp_path: Path, inputs: search.SearchInputs) -> None:
    easy = ["--laco-layers-per-merge", "2", "--laco-interval", "1", "--laco-threshold", "-0.9"]
    options = [*arguments(tmp_path, inputs), "--strategy", "laco", *easy, "--num-blocks", "4", "--json"]
    told = blockpruner("export", *options).json
    assert told["export"]["verified"]
    model = AutoModelForCausalLM.from_pretrained(told["export_path"])
    assert model.config.num_hidden_layers == 3
