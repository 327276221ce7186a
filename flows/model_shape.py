"""The size of the model that a recipe names, and whether what the recipe wants can be had of it. Computes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from blockpruner.architectures import block_sizes, num_parameters
from blockpruner.baichuan import is_foldable
from blockpruner.blocks import all_blocks
from blockpruner.checkpoint import Checkpoint
from blockpruner.collapse import check_laco
from blockpruner.errors import ConfigurationError
from blockpruner.loading import check_tensors, meta_model
from blockpruner.merging import check_mergeable, stored_dtype
from blockpruner.positions import check_sequence_length
from blockpruner.repackable import Repackable
from blockpruner.search import SearchTarget
from blockpruner.speed import check_prompts
from blockpruner.strategies import STRATEGIES
from flows.goals import Goal
from flows.recipe import Recipe


@dataclass(frozen=True)
class ModelShape:
    """How large a model is."""

    num_layers: int
    num_parameters: int


def searched_shape(recipe: Recipe, goal: Goal, checkpoint: Checkpoint) -> ModelShape:
    """The model's size, and whether it has as many blocks to remove as the recipe wants.

    Raises:
        UnsupportedArchitectureError: if the model's family is not in the table.
        CheckpointError: if the weights are not those of the model that config.json describes.
        ConfigurationError: if the target cannot be reached, or a sequence or prompt is longer than the model can read.
    """
    architecture, shapes = meta_model(checkpoint)
    check_tensors(checkpoint, shapes)
    check_sequence_length(shapes, recipe.sequence_length)
    if goal == "speed":
        check_prompts(shapes, recipe.speed_prompt_tokens, recipe.speed_new_tokens)
    num_layers, total = len(architecture.decoder_layers(shapes)), num_parameters(shapes)
    sizes = block_sizes(architecture, shapes)
    candidates = {block: sizes[block] for block in all_blocks(num_layers, recipe.block_kinds)}
    _check_num_blocks(recipe, len(candidates))
    whole_layers = STRATEGIES[recipe.strategy].whole_layers
    holds_pairs = recipe.stock_compatible and not whole_layers
    repackable = Repackable(num_layers, architecture.is_parallel) if holds_pairs else None
    SearchTarget(recipe.num_blocks, recipe.ratio, repackable, whole_layers).check(candidates, total)
    if STRATEGIES[recipe.strategy].procedure == "collapse":
        check_laco(recipe.laco, num_layers)
        check_mergeable(architecture, shapes)
        if not is_foldable(checkpoint):  # whose tensors have other names until then
            stored_dtype(architecture, checkpoint)
    if recipe.export_blocks is not None and whole_layers and recipe.export_blocks % 2:
        raise ConfigurationError(
            f"export_blocks is {recipe.export_blocks}, and strategy {recipe.strategy} removes whole layers, two blocks "
            "each; give an even number"
        )
    if recipe.export_blocks is not None and recipe.num_blocks is not None and recipe.export_blocks > recipe.num_blocks:
        raise ConfigurationError(
            f"export_blocks is {recipe.export_blocks}, but num_blocks is {recipe.num_blocks}; "
            "give at most as many, or search for more"
        )
    return ModelShape(num_layers, total)


def measured_shape(recipe: Recipe, goal: Goal, checkpoint: Checkpoint) -> ModelShape:
    """The size of a model whose pruning is not searched for; raises what `searched_shape` does, less its target's."""
    architecture, shapes = meta_model(checkpoint)
    check_tensors(checkpoint, shapes)
    check_sequence_length(shapes, recipe.sequence_length)
    if goal == "speed":
        check_prompts(shapes, recipe.speed_prompt_tokens, recipe.speed_new_tokens)
    return ModelShape(len(architecture.decoder_layers(shapes)), num_parameters(shapes))


def _check_num_blocks(recipe: Recipe, num_candidates: int) -> None:
    """`SearchTarget.check` refuses this as well, without knowing which kinds of blocks were asked for."""
    if recipe.num_blocks is not None and recipe.num_blocks >= num_candidates:
        kind = "" if recipe.block_kinds == "both" else f"{recipe.block_kinds} "
        raise ConfigurationError(
            f"num_blocks is {recipe.num_blocks}, but of the {num_candidates} {kind}blocks one must stay; "
            f"give at most {num_candidates - 1}"
        )
