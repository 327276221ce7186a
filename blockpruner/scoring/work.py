"""How much arithmetic a sweep does, and how fast: floating-point operations of matrix products, in plain numbers.

Counted as is usual for MFU: 2 operations a weight and token, attention scores and elementwise work left out. Runs no
model.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from blockpruner.architectures import Architecture, block_modules
from blockpruner.blocks import Block, all_blocks
from blockpruner.scoring.decoder import Unit

_PEAK_SIZE = 8192
_PEAK_PRODUCTS = 8


@dataclass(frozen=True)
class Costs:
    """Floating-point operations for one token: two for every parameter that it meets."""

    blocks: Mapping[Block, int]
    head: int

    @classmethod
    def of(cls, architecture: Architecture, model: PreTrainedModel) -> Costs:
        """Count a model's; of a mixture's experts, the share that a token is sent to."""
        config = model.config.get_text_config()
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
        share = config.num_experts_per_tok / experts if experts else 1.0
        blocks = {
            block: sum(
                2 * _active_size(parameter, share)
                for module in block_modules(architecture, model, block)
                for parameter in module.parameters()
            )
            for block in all_blocks(len(architecture.decoder_layers(model)))
        }
        return cls(blocks, 2 * model.get_output_embeddings().weight.numel())

    def forward(self, removed: Collection[Block]) -> int:
        """Operations a token of one full forward pass."""
        return self.head + sum(cost for block, cost in self.blocks.items() if block not in removed)

    def walk(self, units: Sequence[Unit], removed: Collection[Block], candidates: Collection[Block]) -> list[int]:
        """Operations a token before each unit, and as the last entry in all, the head included.

        The trunk and every branch forked earlier pay for a unit's remaining blocks; a branch that forks inside a unit
        of two blocks pays for the one that it keeps.
        """
        total, branches, before = 0, 0, []
        for unit in units:
            before.append(total)
            there = [block for block in unit.blocks if block not in removed]
            total += (1 + branches) * sum(self.blocks[block] for block in there)
            forks = [block for block in there if block in candidates]
            total += sum(self.blocks[other] for b in forks for other in there if other not in unit.leaving_with(b))
            branches += len(forks)
        return [*before, total + branches * self.head]


@dataclass
class Meter:
    """Counts what was computed, and what did not need to be."""

    flops: float = 0.0
    flops_saved: float = 0.0
    tokens: int = 0
    """Tokens scored, for each candidate."""
    seconds: float = 0.0
    peak: float | None = None
    """Operations a second of the device's matrix products as measured here; None where it was not."""
    _started: float | None = field(default=None, repr=False)

    def start(self) -> None:
        """Work begins."""
        self._started = time.monotonic()

    def add(self, flops: float, flops_saved: float, tokens: int) -> None:
        """Some work has been done since the last call."""
        now = time.monotonic()
        self.seconds += now - (self._started if self._started is not None else now)
        self._started = now
        self.flops += flops
        self.flops_saved += flops_saved
        self.tokens += tokens

    def share_saved_since(self, earlier: Meter) -> float:
        """The share of whole sweeps' work that was taken over from the step before, since an earlier copy."""
        saved = self.flops_saved - earlier.flops_saved
        return saved / (saved + self.flops - earlier.flops) if saved else 0.0

    @property
    def flops_per_s(self) -> float:
        """Speed of the work done."""
        return self.flops / self.seconds if self.seconds else 0.0

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: the share of the measured matrix peak; None where that is not known."""
        return self.flops_per_s / self.peak if self.peak else None


def _active_size(parameter: Tensor, expert_share: float) -> int:
    """Parameters that one token meets: of the experts' stacked matrices [experts, out, in], only some."""
    return int(parameter.numel() * (expert_share if parameter.dim() == 3 else 1.0))


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second of a large matrix product on a GPU, measured in about a tenth of a second; None on a CPU."""
    if device.type != "cuda":
        return None
    a, b = (torch.randn(_PEAK_SIZE, _PEAK_SIZE, device=device, dtype=dtype) for _ in range(2))
    a @ b
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(_PEAK_PRODUCTS):
        a @ b
    end.record()
    end.synchronize()
    return float(2.0 * _PEAK_SIZE**3 * _PEAK_PRODUCTS / (start.elapsed_time(end) / 1e3))
