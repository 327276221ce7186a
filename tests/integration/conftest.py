"""Exports that several test modules look at: every family and every awkward set of blocks, written once."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.export import fresh_load
from blockpruner.export.write import WrittenExport, write_export
from tests.integration.export_lab import CASES, REMOVED, Source, TinyFolder, ask_many, load
from tests.tiny_models import TINY_FAMILIES


@pytest.fixture(scope="session")
def sources(tiny_folder: TinyFolder) -> dict[str, Source]:
    return {family: Source.of(tiny_folder(family)) for family in TINY_FAMILIES}


@pytest.fixture(scope="session")
def exports(
    sources: dict[str, Source], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[tuple[str, str], WrittenExport]]:
    """Every case, each in a folder called `model`, as the stage writes it."""
    root = tmp_path_factory.mktemp("exports")
    yield {
        (family, case): write_export(
            sources[family].checkpoint, REMOVED[case], root / family / case.replace(" ", "-") / "model"
        )
        for family, case in CASES
    }
    shutil.rmtree(root)


@pytest.fixture(scope="session")
def answers(
    exports: dict[tuple[str, str], WrittenExport], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """What one fresh process, in a folder of its own, answers for every export."""
    paths = {key: export.path for key, export in exports.items()}
    return ask_many(fresh_load, paths, tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="session")
def loaded(exports: dict[tuple[str, str], WrittenExport]) -> Callable[[str, str], PreTrainedModel]:
    """Gives an export loaded in this process, once; not to be changed."""

    @functools.cache
    def model(family: str, case: str) -> PreTrainedModel:
        return load(exports[family, case].path)

    return model
