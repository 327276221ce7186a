"""How the cost of one search step grows with sequences, layers and vocabulary, beside the law it should follow.

    python -m tests.benchmarks.search_scaling [--device cuda]

The law is the sweep's floating-point operations: linear in sequences; in layers about quadratic, since every block's
branch runs through half of the others; in the vocabulary linear in the head's share. Both columns are relative to the
first row. Memory is what the step took on the device at most, over what was there before (GPU only).
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import torch

from blockpruner.architectures import architecture_of
from blockpruner.blocks import all_blocks
from blockpruner.scoring.build import build_scorer
from blockpruner.scoring.metrics import metric_of
from blockpruner.scoring.settings import ScorerSettings
from blockpruner.scoring.table import ScoreTable
from tests.benchmarks.search_speed import WORKLOADS, Workload, random_model

_BASE = WORKLOADS["small"]
_SERIES = {
    "sequences": [dataclasses.replace(_BASE, num_sequences=number) for number in (8, 16, 32, 64)],
    "layers": [
        dataclasses.replace(_BASE, config={**_BASE.config, "num_hidden_layers": number}) for number in (6, 12, 24, 48)
    ],
    "vocabulary": [
        dataclasses.replace(_BASE, config={**_BASE.config, "vocab_size": number}) for number in (8192, 32768, 131072)
    ],
}


def one_step(workload: Workload, device: str) -> tuple[float, float, float]:
    """Seconds, operations and bytes of the first step of a search, after a warm-up step."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = random_model(workload.config, device, dtype)
    generator = torch.Generator().manual_seed(1)
    shape = (workload.num_sequences, workload.sequence_length)
    token_ids_BT = torch.randint(workload.config["vocab_size"], shape, generator=generator)
    architecture = architecture_of("llama")
    settings = ScorerSettings(compile="off")
    scorer = build_scorer(architecture, model, token_ids_BT, device, metric_of("perplexity"), settings)
    candidates = all_blocks(int(workload.config["num_hidden_layers"]))

    def step() -> float:
        started = time.monotonic()
        scorer.fill((), ScoreTable.empty(candidates, workload.num_sequences), lambda _: None)
        return time.monotonic() - started

    step()
    flops, before = scorer.meter.flops + scorer.meter.flops_saved, 0
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = sum(parameter.nbytes for parameter in model.parameters())
    seconds = step()
    peak = torch.cuda.max_memory_allocated() - before if device != "cpu" else 0
    return seconds, flops, peak


def main() -> None:
    """Print a table for each series."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    where = torch.cuda.get_device_name() if device != "cpu" else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, torch {torch.__version__}")
    for name, workloads in _SERIES.items():
        print(f"| {name} | seconds | relative | operations, relative | memory, GiB |\n|---|---|---|---|---|")
        first: tuple[float, float] | None = None
        for workload in workloads:
            seconds, flops, peak = one_step(workload, device)
            first = first or (seconds, flops)
            size = {"sequences": workload.num_sequences, "layers": workload.config["num_hidden_layers"]}
            label = size.get(name, workload.config["vocab_size"])
            relative = f"{seconds / first[0]:.2f} | {flops / first[1]:.2f}"
            print(f"| {label} | {seconds:.3f} | {relative} | {peak / 2**30:.2f} |", flush=True)


if __name__ == "__main__":
    main()
