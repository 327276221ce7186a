"""The search stage, run as the artifact store runs it: its files, its checkpoints, and what it goes on from."""

from __future__ import annotations

import functools
import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

import stages.search
import stages.search_scorer
from blockpruner.blocks import Block, BlockKind, all_blocks
from blockpruner.calibration import save_token_ids
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import ArtifactError, ConfigurationError, UnsupportedArchitectureError
from blockpruner.journal import SearchJournal
from blockpruner.progress import Progress
from blockpruner.scoring.plan import SweepCut
from blockpruner.scoring.settings import MetricName, ScorerSettings
from blockpruner.scoring.sweep import SweepScorer
from blockpruner.trace import SearchTrace, read_trace
from stages.contract import ArtifactRef, Runtime
from stages.search import STAGE, SearchConfig, SearchInputs, SearchManifest
from tests.oracles import oracle_logits, oracle_perplexity, oracle_sequence_nll
from tests.tiny_models import save_tiny_model, tiny_model, tiny_token_ids

TinyFolder = Callable[[str], Path]
TOKENS = tiny_token_ids(4, 12, seed=1)


class InterruptionError(Exception):
    """Stands for a process that is killed."""


@pytest.fixture(scope="module")
def inputs(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> SearchInputs:
    folder = tmp_path_factory.mktemp("calibration")
    save_token_ids(TOKENS, folder)
    return SearchInputs(Checkpoint.open(str(tiny_folder("qwen2"))), ArtifactRef("c" * 64, folder))


@pytest.fixture
def _every_score_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints within a step after every score, and not every two seconds."""
    monkeypatch.setattr(stages.search, "SearchJournal", functools.partial(SearchJournal, partial_interval_s=0))


def run(
    folder: Path,
    inputs: SearchInputs,
    state: str = "state",
    progress: Callable[[Progress], None] = lambda _: None,
    **config: Any,
) -> tuple[SearchManifest, SearchTrace]:
    """Run the stage into a new folder, with checkpoints in `folder`/`state`."""
    out_dir = folder / f"out-{len(list(folder.glob('out-*')))}"
    out_dir.mkdir()
    runtime = Runtime(progress=progress, state_dir=folder / state, batch_size=2)
    manifest = STAGE.run(SearchConfig(**config), inputs, out_dir, runtime)
    return manifest, read_trace(out_dir)


def without_seconds(trace: SearchTrace) -> list[str]:
    return [trace.summary.model_dump_json()] + [
        step.model_copy(update={"seconds": 0.0, "work_saved": 0.0}).model_dump_json() for step in trace.steps
    ]


def dies_after(num_reports: int) -> Callable[[Progress], None]:
    seen = 0

    def progress(_: Progress) -> None:
        nonlocal seen
        seen += 1
        if seen == num_reports:
            raise InterruptionError

    return progress


def no_model(*_: object, **__: object) -> NoReturn:
    raise AssertionError("a model was loaded")


def oracle(removed: set[Block]) -> float:
    model = tiny_model("qwen2")
    gone = {(block.layer_index, block.block_kind.value) for block in removed}
    logits = oracle_logits(model.state_dict(), model.config.to_dict(), TOKENS, gone)
    return oracle_perplexity(oracle_sequence_nll(logits, TOKENS))


def test_the_files_hold_the_search_and_the_manifest_its_order(tmp_path: Path, inputs: SearchInputs) -> None:
    manifest, trace = run(tmp_path, inputs, num_blocks=3)
    assert sorted(path.name for path in (tmp_path / "out-0").iterdir()) == ["search.json", "trace.jsonl"]
    removed: set[Block] = set()
    for step in trace.steps:
        assert [c.block for c in step.candidates] == [block for block in all_blocks(4) if block not in removed]
        expected = [oracle(removed | {c.block}) for c in step.candidates]
        assert [c.perplexity for c in step.candidates] == pytest.approx(expected, rel=1e-5)
        assert step.block == step.candidates[expected.index(min(expected))].block
        removed.add(step.block)
    num_parameters = sum(parameter.numel() for parameter in tiny_model("qwen2").parameters())
    assert (manifest.num_layers, manifest.num_blocks_total, manifest.num_steps) == (4, 8, 3)
    assert manifest.num_parameters == trace.summary.num_parameters == num_parameters
    assert manifest.dense_perplexity == trace.summary.dense_perplexity == pytest.approx(oracle(set()), rel=1e-5)
    saved = [step.work_saved for step in trace.steps]
    assert saved[0] == 0.0
    assert 0.0 < max(saved) < 1.0
    for entry, step in zip(manifest.pruning_order, trace.steps, strict=True):
        assert Block(layer_index=entry.layer_index, block_kind=entry.block_kind) == step.block
        for name in ("step", "score", "perplexity", "num_parameters_removed", "ratio", "seconds", "work_saved"):
            assert getattr(entry, name) == getattr(step, name), name
    assert STAGE.manifest_type.model_validate_json(manifest.model_dump_json()) == manifest


@pytest.mark.parametrize("kinds", ["mha", "mlp"])
def test_only_the_kinds_asked_for_are_candidates(tmp_path: Path, inputs: SearchInputs, kinds: Any) -> None:
    manifest, trace = run(tmp_path, inputs, num_blocks=2, block_kinds=kinds)
    assert {c.block.block_kind for step in trace.steps for c in step.candidates} == {BlockKind(kinds)}
    assert [len(step.candidates) for step in trace.steps] == [4, 3]
    assert manifest.num_blocks_total == 8


def test_a_ratio_is_of_all_parameters(tmp_path: Path, inputs: SearchInputs) -> None:
    manifest, _ = run(tmp_path, inputs, ratio=0.3)
    ratios = [step.ratio for step in manifest.pruning_order]
    assert ratios[-1] >= 0.3 > ratios[-2]
    removed = [step.num_parameters_removed for step in manifest.pruning_order]
    assert ratios == [count / manifest.num_parameters for count in removed]


@pytest.mark.usefixtures("_every_score_kept")
@pytest.mark.parametrize("num_reports", [1, 2, 4, 5, 8, 9])
def test_an_interrupted_search_goes_on_to_the_same_trace(
    tmp_path: Path, inputs: SearchInputs, num_reports: int
) -> None:
    _, whole = run(tmp_path, inputs, "uninterrupted", num_blocks=3)
    with pytest.raises(InterruptionError):
        run(tmp_path, inputs, progress=dies_after(num_reports), num_blocks=3)
    reports: list[Progress] = []
    _, resumed = run(tmp_path, inputs, progress=reports.append, num_blocks=3)
    assert without_seconds(resumed) == without_seconds(whole)
    assert reports[0].done == reports[0].resumed
    assert (reports[-1].done, reports[-1].total) == (8 + 7 + 6, 8 + 7 + 6)


@pytest.mark.usefixtures("_every_score_kept")
def test_what_was_scored_is_not_scored_again(tmp_path: Path, inputs: SearchInputs) -> None:
    with pytest.raises(InterruptionError):
        run(tmp_path, inputs, progress=lambda p: dies_after(1)(p) if p.done == 4 else None, num_blocks=3)
    reports: list[Progress] = []
    run(tmp_path, inputs, progress=reports.append, num_blocks=3)
    assert reports[0].resumed == 4, "half of the sequences, of all eight candidates"


_KILLS_ITSELF = """
import functools, os, signal, sys
from pathlib import Path
import stages.search
import stages.search_scorer
from blockpruner.checkpoint import Checkpoint
from blockpruner.journal import SearchJournal
from stages.contract import ArtifactRef, Runtime

def progress(report):
    if report.done == 11:  # in the middle of the second step
        os.kill(os.getpid(), signal.SIGKILL)

stages.search.SearchJournal = functools.partial(SearchJournal, partial_interval_s=0)
model, calibration, out_dir, state_dir = sys.argv[1:]
inputs = stages.search.SearchInputs(Checkpoint.open(model), ArtifactRef("c" * 64, Path(calibration)))
runtime = Runtime(progress=progress, state_dir=Path(state_dir), batch_size=2)
stages.search.STAGE.run(stages.search.SearchConfig(num_blocks=3), inputs, Path(out_dir), runtime)
"""


def test_a_search_that_was_killed_goes_on_to_the_same_trace(tmp_path: Path, inputs: SearchInputs) -> None:
    """SIGKILL, in a process of its own: nothing is tidied up."""
    arguments = [str(inputs.model.path), str(inputs.calibration.path), str(tmp_path), str(tmp_path / "state")]
    command = [sys.executable, "-c", _KILLS_ITSELF, *arguments]
    killed = subprocess.run(command, check=False, capture_output=True, cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    reports: list[Progress] = []
    _, resumed = run(tmp_path, inputs, progress=reports.append, num_blocks=3)
    _, whole = run(tmp_path, inputs, "uninterrupted", num_blocks=3)
    assert without_seconds(resumed) == without_seconds(whole)
    assert reports[0].resumed >= 8, "the first step was kept"


def test_more_blocks_go_on_and_fewer_read_the_prefix_without_a_model(
    tmp_path: Path, inputs: SearchInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = run(tmp_path, inputs, "uninterrupted", num_blocks=4)
    run(tmp_path, inputs, num_blocks=2)
    reports: list[Progress] = []
    _, longer = run(tmp_path, inputs, progress=reports.append, num_blocks=4)
    assert without_seconds(longer) == without_seconds(whole)
    assert reports[0].resumed == 8 + 7
    monkeypatch.setattr(stages.search_scorer, "load_model", no_model)
    for num_blocks in (1, 3, 4):
        manifest, prefix = run(tmp_path, inputs, num_blocks=num_blocks)
        assert without_seconds(prefix) == without_seconds(whole)[: 1 + num_blocks]
        assert manifest.num_steps == num_blocks
    manifest, prefix = run(tmp_path, inputs, ratio=whole.steps[1].ratio)
    assert without_seconds(prefix) == without_seconds(whole)[:3]


def test_without_the_steps_a_model_is_loaded_indeed(
    tmp_path: Path, inputs: SearchInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the test above can fail."""
    monkeypatch.setattr(stages.search_scorer, "load_model", no_model)
    with pytest.raises(AssertionError, match="a model was loaded"):
        run(tmp_path, inputs, num_blocks=1)


@pytest.mark.parametrize("damaged", ["step-0002.json", "dense.safetensors"])
def test_a_damaged_checkpoint_is_computed_again(
    tmp_path: Path, inputs: SearchInputs, caplog: pytest.LogCaptureFixture, damaged: str
) -> None:
    _, whole = run(tmp_path, inputs, num_blocks=3)
    path = tmp_path / "state" / damaged
    path.write_bytes(path.read_bytes()[:-9])
    _, again = run(tmp_path, inputs, num_blocks=3)
    assert without_seconds(again) == without_seconds(whole)
    assert "damaged" in caplog.text


@pytest.mark.parametrize("metric", ["perplexity", "kl"])
def test_a_model_whose_own_predictions_are_not_finite_is_refused(
    tmp_path: Path, inputs: SearchInputs, metric: MetricName
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(inputs.model.path, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][int(TOKENS[2, 0])] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    broken = SearchInputs(Checkpoint.open(str(folder)), inputs.calibration)
    number = int((TOKENS[2, 0] == TOKENS).any(dim=1).sum())
    for _ in range(2):  # what was kept of the first try changes nothing
        with pytest.raises(ConfigurationError, match=f"not finite on {number} of {len(TOKENS)} calibration sequences"):
            run(tmp_path, broken, num_blocks=1, metric=metric)


@pytest.mark.parametrize("was_kept", [False, True])
def test_predictions_that_are_finite_the_second_time_are_searched(
    tmp_path: Path, inputs: SearchInputs, was_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another device, or with another scorer."""
    with monkeypatch.context() as patch:
        patch.setattr(SweepScorer, "dense_nll", lambda _: torch.full((len(TOKENS),), math.nan, dtype=torch.float64))
        with pytest.raises(ConfigurationError, match="not finite"):
            run(tmp_path, inputs, num_blocks=1)
        if was_kept:  # by an earlier version
            patch.setattr(stages.search, "_check_finite", lambda *_: None)
            run(tmp_path, inputs, num_blocks=1)
    _, after = run(tmp_path, inputs, num_blocks=1)
    _, fresh = run(tmp_path, inputs, "fresh", num_blocks=1)
    assert without_seconds(after) == without_seconds(fresh)


def test_the_checkpoints_of_another_search_are_not_used(tmp_path: Path, inputs: SearchInputs) -> None:
    run(tmp_path, inputs, num_blocks=1)
    other = SearchInputs(inputs.model, ArtifactRef("d" * 64, inputs.calibration.path))
    with pytest.raises(ArtifactError, match="another search"):
        run(tmp_path, other, num_blocks=1)


@pytest.mark.parametrize(
    "target",
    [
        {"num_blocks": 0},
        {"num_blocks": -1},
        {"num_blocks": 8},
        {"num_blocks": 4, "block_kinds": "mha"},
        {"ratio": 0.0},
        {"ratio": 1.0},
        {"ratio": math.nan},
        {"ratio": 0.99},
        {"num_blocks": 2, "ratio": 0.2},
        {},
    ],
    ids=str,
)
def test_a_target_that_cannot_be_is_refused_before_a_model_is_loaded(
    tmp_path: Path, inputs: SearchInputs, monkeypatch: pytest.MonkeyPatch, target: dict[str, Any]
) -> None:
    monkeypatch.setattr(stages.search_scorer, "load_model", no_model)
    with pytest.raises(ConfigurationError) as caught:
        run(tmp_path, inputs, **target)
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_architecture_is_refused_before_a_model_is_loaded(
    tmp_path: Path, inputs: SearchInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(inputs.model.path, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gptj"}))
    monkeypatch.setattr(stages.search_scorer, "load_model", no_model)
    with pytest.raises(UnsupportedArchitectureError, match="'gptj'"):
        run(tmp_path, SearchInputs(Checkpoint.open(str(folder)), inputs.calibration), num_blocks=1)


def test_what_changes_the_result_changes_the_fingerprint(tmp_path: Path, inputs: SearchInputs) -> None:
    moved = Path(shutil.copytree(inputs.model.path, tmp_path / "moved"))
    tokens = Path(shutil.copytree(inputs.calibration.path, tmp_path / "tokens"))
    other = save_tiny_model(tmp_path / "other", "qwen2", seed=1)
    config = SearchConfig(num_blocks=2)
    same = SearchInputs(Checkpoint.open(str(moved)), ArtifactRef("c" * 64, tokens))
    other_model = SearchInputs(Checkpoint.open(str(other)), inputs.calibration)
    other_text = SearchInputs(inputs.model, ArtifactRef("d" * 64, inputs.calibration.path))
    for identify in (STAGE.fingerprint, STAGE.resume_fingerprint):
        mine = identify(config, inputs)
        assert identify(config, same) == mine
        assert identify(config, other_model) != mine
        assert identify(config, other_text) != mine
        for change in ({"block_kinds": "mha"}, {"dtype": "bfloat16"}, {"metric": "kl"}):
            assert identify(config.model_copy(update=change), inputs) != mine
    for target in (SearchConfig(num_blocks=3), SearchConfig(ratio=0.2)):
        assert STAGE.fingerprint(target, inputs) != STAGE.fingerprint(config, inputs)
        assert STAGE.resume_fingerprint(target, inputs) == STAGE.resume_fingerprint(config, inputs)


def test_bfloat16_is_searched_in_bfloat16(tmp_path: Path, inputs: SearchInputs) -> None:
    _, wide = run(tmp_path, inputs, "float32", num_blocks=1)
    _, narrow = run(tmp_path, inputs, "bfloat16", num_blocks=1, dtype="bfloat16")
    difference = abs(narrow.summary.dense_perplexity / wide.summary.dense_perplexity - 1)
    assert 1e-5 < difference < 0.1


@pytest.mark.parametrize("strategy", ["blockpruner", "oneshot"])
def test_what_the_arithmetic_cannot_tell_apart_is_marked(
    tmp_path: Path, inputs: SearchInputs, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = {("Qwen2ForCausalLM", "bfloat16"): 0.05}
    monkeypatch.setattr(stages.search, "noise_nats", lambda model, dtype: noise[type(model).__name__, dtype])
    _, trace = run(tmp_path, inputs, num_blocks=2, dtype="bfloat16", strategy=strategy)
    for step in trace.steps:
        others = [candidate for candidate in step.candidates if not candidate.chosen]
        close = [abs(math.log(candidate.score / step.score)) <= 0.05 for candidate in others]
        assert [candidate.tied for candidate in others] == close
        assert 0 < sum(close) < len(close)


@pytest.mark.parametrize("metric", ["perplexity", "kl", "js"])
def test_both_scorers_give_the_same_search(tmp_path: Path, inputs: SearchInputs, metric: str) -> None:
    traces = []
    for scorer in ("sweep", "plain"):
        (folder := tmp_path / scorer).mkdir()
        runtime = Runtime(state_dir=folder / "state", scoring=ScorerSettings(scorer=scorer))
        STAGE.run(SearchConfig(num_blocks=4, metric=metric), inputs, folder, runtime)
        traces.append(read_trace(folder))
    fast, plain = traces
    assert fast.removed() == plain.removed()
    for mine, theirs in zip(fast.steps, plain.steps, strict=True):
        assert [c.score for c in mine.candidates] == pytest.approx([c.score for c in theirs.candidates], rel=1e-4)
        assert [c.rank for c in mine.candidates] == [c.rank for c in theirs.candidates]
    if metric != "perplexity":
        assert all(c.score != c.perplexity for step in fast.steps for c in step.candidates)


def test_a_search_goes_on_with_the_cut_that_it_was_begun_with(tmp_path: Path, inputs: SearchInputs) -> None:
    """Another amount of free memory must not change the last bits of a search that goes on; another order may."""

    def search(num_blocks: int, **settings: Any) -> str:
        folder = tmp_path / f"{num_blocks}-{len(settings)}"
        folder.mkdir()
        STAGE.run(
            SearchConfig(num_blocks=num_blocks), inputs, folder, Runtime(state_dir=tmp_path / "state", **settings)
        )
        return str(journal.plan())

    journal = SearchJournal(tmp_path / "state", STAGE.resume_fingerprint(SearchConfig(num_blocks=1), inputs))
    purpose, _, kept = search(1).partition("\n")
    changed = SweepCut.model_validate_json(kept).model_copy(update={"micro_batch": 1, "branches_per_chunk": 1})
    journal.keep_plan(f"{purpose}\n{changed.model_dump_json()}")
    assert search(2) == f"{purpose}\n{changed.model_dump_json()}"
    assert SweepCut.model_validate_json(search(3, batch_size=2).partition("\n")[2]).micro_batch == 2
    journal.keep_plan(f"{purpose}\nof another version")
    assert search(4).partition("\n")[2] == kept
