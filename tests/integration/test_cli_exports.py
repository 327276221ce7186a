"""`export RUN` and its like: how many blocks are meant, in which formats they are written, and where copies go."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from blockpruner.blocks import all_blocks
from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import ExportError
from blockpruner.export.formats import FORMATS, can_hold
from blockpruner.export.source import ExportSource
from flows import model_copy
from flows.formats import PrunedModel, check_family
from tests.integration.command_line import blockpruner
from tests.tiny_models import TINY_FAMILIES, tiny_rows

TinyFolder = Callable[[str], Path]


@pytest.fixture
def given(tmp_path: Path) -> list[object]:
    """The options of every call."""
    return ["--workspace", tmp_path / "ws", "--json"]


@pytest.fixture
def options(tiny_folder: TinyFolder, tmp_path: Path, given: list[object]) -> list[object]:
    """The options of a search."""
    (tmp_path / "cal.txt").write_text("\n".join(tiny_rows(40)))
    text = ["--calibration", tmp_path / "cal.txt", "--num-samples", 40, "--sequence-length", 16]
    return ["--model", tiny_folder("llama"), *text, *given]


def order(result: dict[str, Any]) -> list[tuple[str, int]]:
    return [(step["block_kind"], step["layer_index"]) for step in result["pruning_order"]]


def cached(result: dict[str, Any]) -> dict[str, bool]:
    return {stage["role"]: stage["cached"] for stage in result["stages"]}


@pytest.mark.parametrize("command", ["export", "evaluate"])
def test_a_number_of_blocks_counts_from_the_whole_model(
    options: list[object], given: list[object], command: str
) -> None:
    searched = order(blockpruner("search", *options, "--num-blocks", 3).json)
    fewer = blockpruner("export", "latest", "--num-blocks", 1, *given).json
    assert (fewer["num_blocks_removed"], len(fewer["pruning_order"])) == (1, 3)
    again = blockpruner("export", "latest", *given).json
    assert (again["num_blocks_removed"], cached(again)["export"]) == (1, True), "what that run exported"
    more = blockpruner(command, "latest", "--num-blocks", 5, *given).json
    assert more["export"]["num_blocks_removed"] == more["num_blocks_removed"] == 5
    assert order(more)[:3] == searched


def test_a_ratio_takes_the_place_of_an_earlier_number_of_blocks(options: list[object], given: list[object]) -> None:
    steps = blockpruner("search", *options, "--num-blocks", 4).json["pruning_order"]
    blockpruner("export", "latest", "--num-blocks", 1, *given)
    result = blockpruner("export", "latest", "--ratio", steps[2]["ratio"], *given).json
    assert result["export"]["num_blocks_removed"] == 3
    both = blockpruner("export", "latest", "--num-blocks", 1, "--ratio", 0.1, *given)
    assert (both.status, "both num_blocks and ratio are given" in both.stderr) == (2, True)


def test_several_formats_are_several_rows_and_folders(
    options: list[object], given: list[object], tmp_path: Path
) -> None:
    searched = blockpruner("search", *options, "--num-blocks", 3).json
    out = tmp_path / "out"
    result = blockpruner(
        "export",
        "latest",
        "--format",
        "transformers",
        "--format",
        "zeroed",
        "--dtype",
        "bfloat16",
        "--output",
        out,
        *given,
    ).json
    assert order(result) == order(searched)
    assert [export["format"] for export in result["exports"]] == ["transformers", "zeroed"]
    assert [role for role in cached(result) if role.startswith("export")] == ["export", "export:zeroed"]
    assert cached(result)["search"], "another dtype of the files is no other search"
    for name in ("transformers", "zeroed"):
        model = AutoModelForCausalLM.from_pretrained(out / name, trust_remote_code=True)
        assert model.dtype == torch.bfloat16
    query = "SELECT format, verified, verified_with FROM exports ORDER BY format"
    rows = blockpruner("sql", query, *given).json
    assert [tuple(row.values()) for row in rows] == [
        ("transformers", True, "transformers"), ("zeroed", True, "transformers"),
    ]  # fmt: skip


# --- several formats --------------------------------------------------------------------------------------------------


def formats(*names: str) -> list[str]:
    return [word for name in names for word in ("--format", name)]


def test_a_format_that_is_asked_for_twice_is_written_once(
    options: list[object], given: list[object], tmp_path: Path
) -> None:
    blockpruner("search", *options, "--num-blocks", 2, "--stock-compatible")
    out = tmp_path / "out"
    result = blockpruner("export", "latest", *formats("auto", "stock", "stock"), "--output", out, *given).json
    assert [export["format"] for export in result["exports"]] == ["stock"]
    assert [role for role in cached(result) if role.startswith("export")] == ["export"]
    assert (out / "stock" / "config.json").is_file()
    assert [path.name for path in out.iterdir()] == ["stock"], "several were asked for, whatever auto is"
    assert result["export_path"] == str(out / "stock")


def test_copies_are_all_there_or_none(
    options: list[object], given: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blockpruner("search", *options, "--num-blocks", 2)
    asked = ["export", "latest", *formats("transformers", "zeroed"), "--output", tmp_path / "out", *given]
    copy, calls = shutil.copytree, []

    def failing(source: Path, output: Path, **more: Any) -> Path:
        calls.append(output)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return copy(source, output, **more)

    with monkeypatch.context() as patch:
        patch.setattr(model_copy.shutil, "copytree", failing)
        refused = blockpruner(*asked)
    assert refused.status == 2
    (said,) = [line for line in refused.stderr.splitlines() if line.startswith("Error")]
    assert "No space left on device; they are kept in" in said
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
    assert blockpruner(*asked).status == 0, "the same command again"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["transformers", "zeroed"]


def test_all_formats_are_checked_before_the_first_is_written(
    options: list[object], given: list[object], tmp_path: Path
) -> None:
    blockpruner("search", *options, "--num-blocks", 3)
    refused = blockpruner("export", "latest", *formats("transformers", "stock", "zeroed"), *given)
    assert refused.status == 2
    assert refused.stderr.splitlines()[-1].startswith("Error: format stock needs")
    assert "what can hold it: --format transformers or gguf or zeroed" in refused.stderr
    assert not (tmp_path / "ws" / "artifacts" / "export").exists()


def test_a_format_that_does_not_know_the_family_is_refused_before_the_search(
    tiny_folder: TinyFolder, options: list[object], tmp_path: Path
) -> None:
    other = ["--model", tiny_folder("olmo2"), *options[2:]]
    refused = blockpruner("export", *other, "--num-blocks", 2, *formats("zeroed", "decilm"))
    assert refused.status == 2
    assert "format decilm is there for" in refused.stderr
    assert "what may hold it, by the blocks that go: --format stock" in refused.stderr
    assert not (tmp_path / "ws" / "artifacts").exists()


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_what_is_refused_before_the_search_can_hold_nothing(tiny_folder: TinyFolder, family: str) -> None:
    """Against every arrangement of a few blocks: no format is refused that could have held one."""
    model = Checkpoint.open(str(tiny_folder(family)))
    blocks = all_blocks(ExportSource.of(model, ()).num_layers)
    several = [gone for number in (1, 2) for gone in combinations(blocks, number)]
    several += [tuple(block for block in blocks if block.layer_index != index) for index in range(len(blocks) // 2)]
    for name in FORMATS:
        holds = any(can_hold(ExportSource.of(model, gone), name) for gone in several)
        if holds:
            check_family(PrunedModel(model), [name])
        else:
            with pytest.raises(ExportError, match="what may hold it"):
                check_family(PrunedModel(model), [name])
