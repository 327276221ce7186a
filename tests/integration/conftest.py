"""Exports that several test modules look at: every family and every awkward set of blocks, written once."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.export import fresh_load
from blockpruner.export.write import WrittenExport, write_export
from tests.integration.export_lab import CASES, REMOVED, REQUEST, Source, TinyFolder, load
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


_MANY = """
import runpy, sys
for line in sys.stdin.read().splitlines():
    sys.argv = ["fresh_load", *line.split("\\t")]
    runpy.run_path({program!r}, run_name="__main__")
"""


@pytest.fixture(scope="session")
def answers(
    exports: dict[tuple[str, str], WrittenExport], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """What one fresh process, in a folder of its own, answers for every export."""
    folder = tmp_path_factory.mktemp("answers")
    save_file(REQUEST, folder / "request")
    numbered = list(enumerate(exports.items()))
    lines = [f"{export.path}\t{folder / 'request'}\t{folder / str(number)}" for number, (_, export) in numbered]
    program = _MANY.format(program=fresh_load.__file__)
    command = [sys.executable, "-I", "-c", program]
    finished = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, cwd=folder, check=False)
    assert finished.returncode == 0, finished.stderr
    return {key: load_file(folder / str(number)) for number, (key, _) in numbered}


@pytest.fixture(scope="session")
def loaded(exports: dict[tuple[str, str], WrittenExport]) -> Callable[[str, str], PreTrainedModel]:
    """Gives an export loaded in this process, once; not to be changed."""

    @functools.cache
    def model(family: str, case: str) -> PreTrainedModel:
        return load(exports[family, case].path)

    return model
