"""A worker on another machine computes with the model that the search is of, or says that it has another."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blockpruner.checkpoint import Checkpoint
from blockpruner.scoring.micro_batches import Refused
from blockpruner.scoring.plan import Team
from stages.ray_crew import RayCrew, Share
from stages.ray_worker import Place, Prepared, RayWorker
from stages.search_scorer import ScoringJob
from tests.tiny_models import save_tiny_model, tiny_token_ids

TinyFolder = Callable[[str], Path]
TOKENS = tiny_token_ids(2, 8)
ELSEWHERE = Place(Team(1, 1), num_threads=1, is_elsewhere=True)


@pytest.fixture
def model(tmp_path: Path, tiny_folder: TinyFolder) -> Path:
    return shutil.copytree(tiny_folder("llama"), tmp_path / "model")


def sent(model: Checkpoint) -> ScoringJob:
    """A job of this model as it arrives on another machine."""
    parcels: list[bytes] = []

    def remote(*arguments: Any) -> object:
        parcels.append(pickle.dumps(arguments))
        return object()

    actor = SimpleNamespace(introduce=SimpleNamespace(remote=remote))
    actor_class = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: actor))
    ray = SimpleNamespace(put=lambda value: value, remote=lambda _: actor_class)
    crew = RayCrew(ray, ScoringJob(model, 4, 1, "float32", "perplexity", "cpu"), TOKENS, Share(1, 1, 0))
    crew._hire()
    _, job = pickle.loads(parcels[0])  # noqa: S301  # our own
    assert isinstance(job, ScoringJob)
    return job


def prepared(job: ScoringJob) -> Prepared | Refused:
    return RayWorker().prepare(job, TOKENS, None, ELSEWHERE)


def test_the_same_model_at_the_same_path_is_taken(model: Path) -> None:
    job = sent(Checkpoint.open(str(model)))
    shutil.copytree(model, model.with_name("copy"))
    shutil.rmtree(model)
    model.with_name("copy").rename(model)
    assert isinstance(prepared(job), Prepared)


@pytest.mark.parametrize("changes", [{"seed": 1}, {"rope_theta": 9999.0}])
def test_another_model_at_the_same_path_is_refused(model: Path, changes: dict[str, Any]) -> None:
    """Other weights, or another configuration of the same ones: its scores would be taken for this model's."""
    job = sent(Checkpoint.open(str(model)))
    shutil.rmtree(model)
    save_tiny_model(model, **changes)
    assert prepared(job) == Refused(f"{model} holds another model than on the machine that searches; copy it anew")


def test_a_model_of_the_hub_is_found_where_it_lies_here(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Checkpoint.open(str(model))
    job = sent(replace(opened, name="owner/name", hub_id="owner/name"))
    model.rename(model.with_name("cache"))
    assert isinstance(prepared(job), Refused)
    here = {"owner/name": str(model.with_name("cache"))}
    monkeypatch.setattr("blockpruner.checkpoint._fetch", lambda hub_id: Path(here[hub_id]))
    assert isinstance(prepared(job), Prepared)
