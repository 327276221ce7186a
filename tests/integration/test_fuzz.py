"""Files spoiled by chance: a command does its work or refuses in one line. It never breaks, hangs or loses anything.

A workspace's own files are spoiled in test_fuzz_workspace.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from blockpruner.errors import ConfigurationError
from flows.grid import load_comparison
from tests.integration.bad_input_lab import Lab, little_memory
from tests.integration.fuzz_lab import FACTOR, done_or_refused, fuzz, spoiled_bytes, spoiled_json
from tests.tiny_models import tiny_rows

TinyFolder = Callable[[str], Path]
ROWS = tiny_rows(12)
JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
BYTE_FILES = (*JSON_FILES, "model.safetensors", "model.safetensors")
pytestmark = [pytest.mark.timeout(300 * FACTOR)]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_folder: TinyFolder) -> Lab:
    """A model, texts of every kind, and a search that was done before anything is spoiled."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(tiny_folder("llama"), folder / "model")
    (folder / "cal.txt").write_text("\n".join(ROWS))
    made = Lab(folder, folder / "ws")
    assert made.search().status == 0
    return made


@pytest.fixture(autouse=True)
def _nothing_is_lost(lab: Lab) -> object:
    """After all examples the first search is still there, every byte of it."""
    with little_memory():
        yield
    assert [stage["cached"] for stage in lab.search("--json").json["stages"]] == [True, True]


def texts() -> dict[str, bytes]:
    """Good files by suffix."""
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"text": ROWS, "id": list(range(len(ROWS)))}), sink)
    return {
        "txt": "\n".join(ROWS).encode(),
        "jsonl": "".join(json.dumps({"text": row, "id": 3}) + "\n" for row in ROWS).encode(),
        "csv": ("id,text\r\n" + "".join(f'{n},"{row}"\r\n' for n, row in enumerate(ROWS))).encode(),
        "parquet": sink.getvalue().to_pybytes(),
    }


@st.composite
def spoiled_texts(draw: st.DrawFn) -> tuple[str, bytes]:
    suffix, good = draw(st.sampled_from(sorted(texts().items())))
    return suffix, draw(spoiled_bytes(good))


RECIPE = b"""\
model: model
calibration: cal.txt
num_samples: all
sequence_length: 16
num_blocks: 2
block_kinds: mlp
eval_text: [cal.txt]
export_format: [auto, gguf]
device: cpu
laco_threshold: 0.5
speed_batch_sizes: 1,2
memory_budget: 8GiB
name: "a name"
"""
COMPARISON = b"""\
name: all
base: {model: model, calibration: cal.txt, sequence_length: 16}
grid:
- {ratio: [0.1, 0.2], strategy: [blockpruner, random], seed: 1}
- num_blocks: 2
external: [{path: model, label: "of others"}]
"""


@fuzz(60)
@given(content=spoiled_bytes(RECIPE))
def test_recipes(content: bytes, lab: Lab) -> None:
    done_or_refused(lab.call("calibrate", lab.file("recipe.yaml", content)))


@fuzz(60)
@given(content=spoiled_bytes(COMPARISON))
def test_comparisons(content: bytes, lab: Lab) -> None:
    with suppress(ConfigurationError):
        load_comparison(str(lab.file("comparison.yaml", content)), {}, {})


@fuzz(80)
@given(spoiled=spoiled_texts())
def test_calibration_files(spoiled: tuple[str, bytes], lab: Lab) -> None:
    suffix, content = spoiled
    given_file = ["--calibration", lab.file(f"spoiled.{suffix}", content), "--sequence-length", 16, "--num-samples", 2]
    done_or_refused(lab.call("calibrate", "--model", lab.model, *given_file))


@fuzz(80)
@given(data=st.data())
def test_checkpoints(data: st.DataObject, lab: Lab) -> None:
    as_json = data.draw(st.booleans())
    name = data.draw(st.sampled_from(JSON_FILES if as_json else BYTE_FILES))
    good = (lab.model / name).read_bytes()
    copy = lab.path / "spoiled"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(lab.model, copy)
    (copy / name).write_bytes(data.draw(spoiled_json(good) if as_json else spoiled_bytes(good)))
    command, target = data.draw(st.sampled_from((("search", ["--num-blocks", 1]), ("baseline", []))))
    done_or_refused(lab.call(command, *lab.good, *target, "--model", copy))
