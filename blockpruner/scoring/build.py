"""Puts a scorer together: what the model costs, where its weights lie, what fits, what is compiled.

The only place in the library that asks a device how much memory it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blockpruner.architectures import Architecture
from blockpruner.loading import release_memory
from blockpruner.scoring import kernels
from blockpruner.scoring import plan as plans
from blockpruner.scoring.decoder import Decoder
from blockpruner.scoring.host_memory import available_bytes
from blockpruner.scoring.interface import SurveyScorer
from blockpruner.scoring.loss import TokenLosses
from blockpruner.scoring.metrics import Metric
from blockpruner.scoring.plain import PlainScorer
from blockpruner.scoring.plan import Machine, SweepCut, SweepPlan, SweepShape, Team, plan_sweep
from blockpruner.scoring.residency import Resident, Streamed
from blockpruner.scoring.settings import ScorerSettings
from blockpruner.scoring.sweep import SweepScorer
from blockpruner.scoring.work import Costs, Meter, matrix_peak

_HOST_SHARE = 0.5
"""Of the host's free memory, for snapshots beside a GPU."""
_CPU_SHARE = 0.25
"""Of the machine's free memory, for a sweep on the CPU."""
_GPU_SHARE = 0.95
_WEIGHTS_SHARE = 0.7
"""Of the memory that may be used; more weights than that leave too little for a sweep."""
_PEAK_BYTES = 4 * 2**30
"""A budget from which there is room to measure the device's matrix peak."""


def is_streamed(weight_bytes: int, device: str, memory_budget: int | None) -> bool:
    """Whether a model's weights lie on the host and are fetched layer by layer.

    They do when they are too many for what is free of the GPU, or for the share of it that may be used.
    """
    if not device.startswith("cuda"):
        return False
    free = int(_GPU_SHARE * torch.cuda.mem_get_info(device)[0])
    return weight_bytes > _WEIGHTS_SHARE * min(free, memory_budget or free)


def made_for(device: str, settings: ScorerSettings, batch_size: int | None) -> str:
    """What a cut is made for: on another device, or asked for otherwise, a search needs another."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return f"{name}, budget {settings.memory_budget}, batch size {batch_size}"


@contextmanager
def device_memory(device: str, memory_budget: int | None) -> Iterator[None]:
    """Let the body use so much of a GPU's memory (None: all), and give back what it leaves behind."""
    if not device.startswith("cuda"):
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    index = _indexed(torch.device(device))
    torch.cuda.set_per_process_memory_fraction(min(1.0, (memory_budget or total) / total), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)
        release_memory()


def build_scorer(
    architecture: Architecture,
    model: PreTrainedModel,
    token_ids_BT: Tensor,
    device: str,
    metric: Metric,
    settings: ScorerSettings,
    batch_size: int | None = None,
    cut: SweepCut | None = None,
    on_plan: Callable[[SweepPlan], None] = lambda _: None,
    *,
    whole_layers: bool = False,
    team: Team | None = None,
) -> SurveyScorer:
    """A scorer for a model that lies on `device`, or on the CPU if it is to be streamed.

    Args:
        architecture: the model's row of the table.
        model: a causal LM in eval mode.
        token_ids_BT: the calibration set, [B, T].
        device: where to compute.
        metric: what a block's removal is judged by.
        settings: how to compute.
        batch_size: sequences of a micro-batch; None: what fits.
        cut: the cut of an interrupted search, to go on with; None: a new one.
        on_plan: told of the plan, and of each smaller one that has to be made.
        whole_layers: whether a candidate stands for its layer, and not for a block.
        team: those who share the search's micro-batches, this scorer among them; None: it has them all.

    Raises:
        ConfigurationError: if there is too little memory for one sequence.
    """
    compute = _indexed(torch.device(device))
    if settings.scorer == "plain":
        nn.Module.to(model, compute)
        return PlainScorer(architecture, model, token_ids_BT, batch_size, metric, Meter(), whole_layers=whole_layers)
    shape, costs = _shape(architecture, model, token_ids_BT)
    flops = shape.flops_per_sequence * shape.num_sequences
    compiles = kernels.compiles(settings.compile, compute, flops, metric.name)
    kernels.await_preparation()
    run, divergence = (
        kernels.compiled(metric, compute) if compiles else (kernels.uncompiled(compute), metric.divergence)
    )
    is_tight = settings.memory_budget is not None and settings.memory_budget < _PEAK_BYTES
    meter = Meter(peak=None if is_tight else matrix_peak(compute, model.dtype))
    is_remote = compute.type == "cuda" and model.device.type == "cpu"
    residency = _streamed(architecture, model, compute) if is_remote else Resident()
    length = int(token_ids_BT.shape[1])
    decoder = Decoder(architecture, model, length, residency, run, whole_layers=whole_layers)
    team = team or Team()
    machine = replace(_machine(compute, settings.memory_budget, team.num_on_machine), compiles=compiles)
    plan = plan_sweep(shape, machine, batch_size, cut, team.num_workers)
    on_plan(plan)
    nll = kernels.nll_for(compute, model.dtype, shape.vocab_size, flops)

    def make_losses(cut: SweepCut) -> TokenLosses:
        return TokenLosses(decoder.logits, divergence, cut.logit_elements, shape.vocab_size, nll)

    return SweepScorer(decoder, token_ids_BT, metric, plan, costs, make_losses, meter, on_plan, team.num_workers)


def _indexed(device: torch.device) -> torch.device:
    """A GPU with its number."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _streamed(architecture: Architecture, model: PreTrainedModel, device: torch.device) -> Streamed:
    """Pin the decoder layers on the host and move everything else to the device."""
    layers = architecture.decoder_layers(model)
    inside = {id(tensor) for layer in layers for tensor in (*layer.parameters(), *layer.buffers())}
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) not in inside:
                tensor.data = tensor.data.to(device)
    return Streamed(layers, device)


def _shape(architecture: Architecture, model: PreTrainedModel, token_ids_BT: Tensor) -> tuple[SweepShape, Costs]:
    config, costs = model.config.get_text_config(), Costs.of(architecture, model)
    num_sequences, sequence_length = token_ids_BT.shape
    hidden_bytes = config.hidden_size * model.dtype.itemsize
    # Half of a forward pass for each candidate and the trunk, and a head for each.
    flops = (len(costs.blocks) + 1) * (sum(costs.blocks.values()) / 2 + costs.head) * sequence_length
    projected = _projected(architecture.decoder_layers(model)[0], getattr(config, "num_experts_per_tok", 1))
    shape = SweepShape(
        num_sequences=num_sequences,
        sequence_length=sequence_length,
        num_candidates=len(costs.blocks),
        hidden_bytes=hidden_bytes,
        working_bytes=4 * hidden_bytes + 2 * projected * model.dtype.itemsize,
        vocab_size=config.vocab_size,
        flops_per_sequence=flops,
    )
    return shape, costs


def _projected(layer: nn.Module, experts_per_token: int) -> int:
    """Elements that all of a layer's matrices give for one token, at most; some families keep them transposed."""
    matrices = [parameter for parameter in layer.parameters() if parameter.dim() > 1]
    return sum(max(each.shape[-2:]) * (experts_per_token if each.dim() == 3 else 1) for each in matrices)


def _machine(device: torch.device, memory_budget: int | None, num_sharing: int) -> Machine:
    available = available_bytes() // num_sharing
    if device.type != "cuda":
        usable = memory_budget or int(_CPU_SHARE * available)
        return Machine(usable, 0, plans.CPU_CHUNK_BYTES, plans.CPU_LOGIT_ELEMENTS, plans.CPU_MICRO_BATCH_FLOPS)
    allocated = torch.cuda.memory_allocated(device)
    reusable = torch.cuda.memory_reserved(device) - allocated
    usable = int(_GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + reusable))
    if memory_budget:
        usable = min(usable, memory_budget - allocated)
    host = int(_HOST_SHARE * available)
    return Machine(usable, host, plans.CUDA_CHUNK_BYTES, plans.CUDA_LOGIT_ELEMENTS, plans.CUDA_MICRO_BATCH_FLOPS)
