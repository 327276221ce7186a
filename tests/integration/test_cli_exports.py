"""`export RUN` and its like: how many blocks are meant, in which formats they are written, and where copies go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.integration.command_line import blockpruner
from tests.tiny_models import tiny_rows

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
