"""The recipes of the paper's tables on the real models' shapes: what each whole-layer method ends at.

The shapes are those of the models' config.json on the hub, counted by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blockpruner.blocks import Block, BlockKind, all_blocks
from blockpruner.collapse import CollapseSearch
from blockpruner.journal import SearchJournal
from blockpruner.search import SearchTarget
from blockpruner.trace import LayerMerge
from flows.grid import Cell, comparison_names, load_comparison
from flows.paper_figures import paper_figures


@dataclass(frozen=True)
class Shape:
    """What a Llama-like model's parameters follow from."""

    num_layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    num_parameters: int
    """As published."""
    qkv_bias: bool = False

    def size(self, kind: BlockKind) -> int:
        """One block's, its norm included."""
        if kind is BlockKind.MLP:
            return 3 * self.hidden * self.intermediate + self.hidden
        return 4 * self.hidden**2 + self.hidden + (3 * self.hidden if self.qkv_bias else 0)

    @property
    def layer(self) -> int:
        return self.size(BlockKind.MHA) + self.size(BlockKind.MLP)


SHAPES = {
    "paper-llama2-7b": Shape(32, 4096, 11008, 32000, 6_738_415_616),
    "paper-llama2-13b": Shape(40, 5120, 13824, 32000, 13_015_864_320),
    "paper-qwen1.5-7b": Shape(32, 4096, 11008, 151936, 7_721_324_544, qkv_bias=True),
    "paper-qwen1.5-14b": Shape(40, 5120, 13696, 152064, 14_167_290_880, qkv_bias=True),
    "paper-baichuan2-7b": Shape(32, 4096, 11008, 125696, 7_505_973_248),
}
NUM_LAYERS = {
    "paper-llama2-7b": 7,
    "paper-llama2-13b": 10,
    "paper-qwen1.5-7b": 8,
    "paper-qwen1.5-14b": 10,
    "paper-baichuan2-7b": 8,
}
"""As the recipes say in their first lines."""


class Accepting:
    """A bench on which every merge leaves the model as it was."""

    def similarity(self, merges: Sequence[LayerMerge], removed: Sequence[Block]) -> float:
        return 1.0

    def nll(self, merges: Sequence[LayerMerge], removed: Sequence[Block]) -> Tensor:
        return torch.ones(1, dtype=torch.float64)


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_add_up(name: str) -> None:
    shape = SHAPES[name]
    outside = 2 * shape.vocabulary * shape.hidden + shape.hidden
    assert shape.num_layers * shape.layer + outside == shape.num_parameters


def test_every_recipe_of_the_papers_tables_is_here() -> None:
    assert set(SHAPES) == {name for name in comparison_names() if name.startswith("paper-")}


def cells_of(name: str, *strategies: str) -> list[Cell]:
    return [cell for cell in load_comparison(name, {}, {}).cells if cell.recipe.strategy in strategies]


@pytest.mark.parametrize("name", SHAPES)
def test_laco_ends_where_the_paper_can_stand_beside_it(name: str, tmp_path: Path) -> None:
    """And with as many layers as the other methods of whole layers."""
    (cell,), shape = cells_of(name, "laco"), SHAPES[name]
    sizes = {block: shape.size(block.block_kind) for block in all_blocks(shape.num_layers, "both")}
    journal = SearchJournal(tmp_path, "x")
    search = CollapseSearch(Accepting(), sizes, shape.num_parameters, journal, settings=cell.recipe.laco)
    steps = search.run(SearchTarget(ratio=cell.recipe.ratio, whole_layers=True))
    assert sum(len(step.blocks) for step in steps) == 2 * NUM_LAYERS[name]
    model = paper_figures().model(cell.recipe.model, shape.num_layers)
    assert model is not None
    assert model.nearest("laco", steps[-1].ratio) is not None


@pytest.mark.parametrize("name", SHAPES)
def test_and_so_do_the_others(name: str) -> None:
    shape = SHAPES[name]
    model = paper_figures().model(load_comparison(name, {}, {}).cells[0].recipe.model, shape.num_layers)
    assert model is not None
    for cell in cells_of(name, "layers", "shortgpt", "rm"):
        assert cell.recipe.ratio is not None
        share = shape.layer / shape.num_parameters
        num_layers = next(n for n in range(1, shape.num_layers) if n * share >= cell.recipe.ratio)
        assert num_layers == NUM_LAYERS[name]
        assert model.nearest(cell.recipe.strategy, num_layers * share) is not None
