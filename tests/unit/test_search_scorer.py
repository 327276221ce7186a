"""A scoring job: the model and the scorer of one search."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blockpruner.checkpoint import Checkpoint
from stages import search_scorer
from stages.search_scorer import ScoringJob
from tests.tiny_models import tiny_token_ids


@pytest.mark.parametrize("trusts", [False, True])
def test_the_compiler_is_told_what_will_be_computed(
    trusts: bool, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not where code of the model may call modules while it loads."""
    told: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(search_scorer, "prepare", lambda *args, **kwargs: told.append((args, kwargs)))
    job = ScoringJob(
        Checkpoint.open(str(tiny_folder("llama"))), 4, 12345, "float32", "js", "cpu", trust_remote_code=trusts
    )
    job.parts(tiny_token_ids(3, 8), None)
    expected = (("cpu", job.settings, "js"), {"num_layers": 4, "num_parameters": 12345, "num_tokens": 24})
    assert told == ([] if trusts else [expected])
