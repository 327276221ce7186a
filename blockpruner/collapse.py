"""LaCo (Yang et al. 2024, Algorithm 1): rear layers collapse into a layer before them, from the top down.

A merge stays if the model still ends in nearly the same hidden states as the dense one; else the next lower layer is
tried. The order follows from the settings and the model alone, so a search for more is the continuation of one for
less; it stops at the first merge that reaches its target, which may be a layer or more beyond.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from blockpruner.architectures import Architecture
from blockpruner.blocks import Block, both_of
from blockpruner.errors import ConfigurationError
from blockpruner.journal import SearchJournal
from blockpruner.masking import masked
from blockpruner.merging import MergedLayers
from blockpruner.perplexity import perplexity, sequence_nll
from blockpruner.progress import Progress, ProgressCallback, silent
from blockpruner.search import Search, SearchTarget, rank_scores, removed_by, with_units
from blockpruner.strategies import LacoSettings
from blockpruner.trace import LayerMerge, SearchStep

NUM_ROWS = 10
"""Calibration sequences that the similarity is taken over, at most; the paper takes ten sentences."""


class MergeBench(Protocol):
    """Tries merges."""

    def similarity(self, merges: Sequence[LayerMerge], removed: Sequence[Block]) -> float:
        """Mean cosine similarity of the last hidden states, merged to dense."""
        ...

    def nll(self, merges: Sequence[LayerMerge], removed: Sequence[Block]) -> Tensor:
        """Each calibration sequence's mean token NLL in nats: float64 [B]."""
        ...


class MergingModel:
    """A loaded model that can be merged and unmerged; the bench of a real search."""

    def __init__(
        self,
        architecture: Architecture,
        model: PreTrainedModel,
        token_ids_BT: Tensor,
        stored: torch.dtype,
        batch_size: int | None = None,
    ) -> None:
        """Try merges on token ids [B, T]; the checkpoint holds the weights as `stored`."""
        self._architecture, self._model = architecture, model
        self._token_ids_BT, self._batch_size = token_ids_BT, batch_size
        self._layers = MergedLayers(architecture, model, stored)
        self._dense = [self._last_hidden(row) for row in range(min(NUM_ROWS, len(token_ids_BT)))]

    def similarity(self, merges: Sequence[LayerMerge], removed: Sequence[Block]) -> float:
        """See `MergeBench.similarity`.

        As in the authors' code, a sequence's hidden states (after the final norm) are one long vector.
        """
        self._layers.use(merges)
        with masked(self._architecture, self._model, removed):
            cosines = [
                functional.cosine_similarity(self._last_hidden(row), dense, dim=0)
                for row, dense in enumerate(self._dense)
            ]
        return float(torch.stack(cosines).double().mean())

    def nll(self, merges: Sequence[LayerMerge], removed: Sequence[Block]) -> Tensor:
        """See `MergeBench.nll`."""
        self._layers.use(merges)
        with masked(self._architecture, self._model, removed):
            return sequence_nll(self._model, self._token_ids_BT, self._batch_size)

    @torch.inference_mode()
    def _last_hidden(self, row: int) -> Tensor:
        """The last hidden states of one sequence: float32 [T * D]."""
        token_ids_1T = self._token_ids_BT[row : row + 1].to(self._model.device)
        hidden: Tensor = self._model.base_model(input_ids=token_ids_1T, use_cache=False).last_hidden_state
        return hidden.float().flatten()


class CollapseSearch(Search):
    """Merges from the top down. Resumable at every merge."""

    def __init__(
        self,
        bench: MergeBench,
        sizes: Mapping[Block, int],
        num_parameters: int,
        journal: SearchJournal,
        progress: ProgressCallback = silent,
        *,
        settings: LacoSettings | None = None,
    ) -> None:
        """Search among the layers whose blocks are in `sizes`.

        Raises:
            ConfigurationError: if the settings do not fit so many layers.
        """
        super().__init__(sizes, num_parameters, journal, progress)
        self._bench = bench
        self._settings = settings or LacoSettings()
        self._num_layers = 1 + max(block.layer_index for block in sizes)
        check_laco(self._settings, self._num_layers)
        self._resumed = 0

    def _begin(self, steps: Sequence[SearchStep]) -> None:
        self._resumed = len(steps)

    def _next_step(self, steps: Sequence[SearchStep], target: SearchTarget) -> SearchStep:
        started, removed = time.monotonic(), removed_by(steps)
        before = [step.merge for step in steps if step.merge is not None]
        kept, highest = self._left_after(before)
        scores: dict[Block, float] = {}
        units: dict[Block, tuple[Block, ...]] = {}
        for position in range(highest, self._settings.first_layer - 1, -1):
            merge = self._merge_at(kept, position)
            if merge is None:
                continue
            self._report(steps, f"into layer {merge.layer_index}")
            unit = tuple(block for index in merge.merged for block in both_of(index))
            similarity = self._bench.similarity((*before, merge), (*removed, *unit))
            scores[unit[0]], units[unit[0]] = 1.0 - similarity, unit
            if similarity > self._settings.threshold:
                measured = perplexity(self._bench.nll((*before, merge), (*removed, *unit)))
                return self._accepted(steps, scores, units, merge, measured, time.monotonic() - started)
        raise self._exhausted(removed, scores)

    def _left_after(self, merges: Sequence[LayerMerge]) -> tuple[list[int], int]:
        """The layers that are left, and the position among them of the next attempt."""
        kept = list(range(self._num_layers))
        c, position = self._settings.layers_per_merge, (self._settings.last_layer or self._num_layers)
        position -= c
        for merge in merges:
            at = kept.index(merge.layer_index)
            kept = [index for index in kept if index not in merge.merged]
            position = min(at - self._settings.interval, len(kept) - c)
        return kept, position

    def _merge_at(self, kept: Sequence[int], position: int) -> LayerMerge | None:
        """The layers after a position, as many as go into one; None if there are none."""
        merged = kept[position + 1 : position + self._settings.layers_per_merge]
        return LayerMerge(layer_index=kept[position], merged=tuple(merged)) if merged else None

    def _accepted(
        self,
        steps: Sequence[SearchStep],
        scores: Mapping[Block, float],
        units: Mapping[Block, tuple[Block, ...]],
        merge: LayerMerge,
        measured: float,
        seconds: float,
    ) -> SearchStep:
        """The step of a merge that stays; what was tried above it is in its candidates."""
        chosen = both_of(merge.merged[0])[0]
        ordered = dict(sorted(scores.items()))
        ranked = with_units(rank_scores(ordered, ordered, 0.0, lambda _: chosen), units)
        known = tuple(each.model_copy(update={"perplexity": measured}) if each.chosen else each for each in ranked)
        return self._step(steps, known, perplexity=measured, seconds=seconds, merge=merge)

    def _exhausted(self, removed: Sequence[Block], scores: Mapping[Block, float]) -> ConfigurationError:
        best = f" (the best one left has {1 - min(scores.values()):.3f})" if scores else ""
        return ConfigurationError(
            f"laco removes {len(removed)} blocks, and then no merge keeps a similarity above "
            f"{self._settings.threshold:g}{best}; give a lower --laco-threshold or --laco-interval, more "
            "--laco-layers-per-merge, or remove less"
        )

    def _report(self, steps: Sequence[SearchStep], note: str) -> None:
        self._progress(Progress(len(steps), None, "merges", note, self._resumed))


def check_laco(settings: LacoSettings, num_layers: int) -> None:
    """Refuse settings that do not fit a model.

    Raises:
        ConfigurationError: naming the setting.
    """
    last = settings.last_layer or num_layers
    if last > num_layers:
        raise ConfigurationError(f"laco_last_layer is {last}, and the model has {num_layers} layers; give at most that")
    if settings.first_layer + settings.layers_per_merge > last:
        raise ConfigurationError(
            f"laco_layers_per_merge is {settings.layers_per_merge}, but from laco_first_layer "
            f"{settings.first_layer} to laco_last_layer {last} there are {max(0, last - settings.first_layer)} layers; "
            "give fewer layers a merge, or a wider range"
        )
