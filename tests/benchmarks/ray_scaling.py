"""What a search on Ray costs and gains: one worker against none, and more workers against one.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.ray_scaling MODEL_DIR --tokens 16x256 --num-blocks 2 --workers 1,2
    python -m tests.benchmarks.ray_scaling MODEL_DIR --device cuda --workers 1,2,4,8

On CPUs give all the same number of threads, as above. Tokens are drawn at random: which they are changes no time. Each
search is begun anew with the same cut and must end with the same bits. "Start" is Ray, the workers' processes, loading
the model (without Ray: loading alone) and the dense model's pass; "steps" is the rest. What limits the scaling is the
number of micro-batches M: with W workers a step lasts as long as the ceil(M / W) micro-batches of whoever has most, so
"projected" is that over M.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor

import flows  # noqa: F401  (sets what the application sets before torch takes memory)
from blockpruner.architectures import num_parameters
from blockpruner.blocks import Block, all_blocks
from blockpruner.checkpoint import Checkpoint
from blockpruner.loading import meta_model, resolve_dtype
from blockpruner.scoring.build import device_memory
from blockpruner.scoring.interface import Scorer
from blockpruner.scoring.metrics import metric_of
from blockpruner.scoring.plan import SweepCut
from blockpruner.scoring.table import ScoreTable
from stages.executor import ExecutorSettings
from stages.ray_scorer import ray_scorer
from stages.search_scorer import ScoringJob

Start = Callable[[], AbstractContextManager[Scorer]]


class Bench:
    """Searches of one model and calibration set, all with one cut."""

    def __init__(self, job: ScoringJob, token_ids_BT: Tensor, num_blocks: int) -> None:
        self._job, self._token_ids_BT, self._num_blocks = job, token_ids_BT, num_blocks
        self._candidates = all_blocks(job.num_layers)
        self.cut: SweepCut | None = None

    @property
    def num_micro_batches(self) -> int:
        """M."""
        assert self.cut is not None
        return math.ceil(len(self._token_ids_BT) / self.cut.micro_batch)

    @contextmanager
    def here(self) -> Iterator[Scorer]:
        """Without Ray."""
        with device_memory(self._job.device, None):
            yield self._job.parts(self._token_ids_BT, self.cut, lambda plan: self._keep("", plan.cut))[0]

    def on(self, settings: ExecutorSettings) -> AbstractContextManager[Scorer]:
        """On Ray."""
        return ray_scorer(self._job, self._token_ids_BT, settings, lambda _: self.cut, self._keep)

    def timed(self, start: Start) -> tuple[float, float, Tensor]:
        """Seconds of the start and of the steps, and the last step's scores."""
        begun = time.monotonic()
        with start() as scorer:
            scorer.dense_nll()
            ready = time.monotonic()
            removed: list[Block] = []
            for _ in range(self._num_blocks):
                candidates = tuple(block for block in self._candidates if block not in removed)
                table = ScoreTable.empty(candidates, scorer.num_sequences)
                scorer.fill(tuple(removed), table, lambda _: None)
                scores = [metric_of(self._job.metric).mean_nats(nll_B, None) for nll_B in table.nll_CB]
                removed.append(candidates[scores.index(min(scores))])
            ended = time.monotonic()
            del scorer  # its memory is given back here, for the workers that come next
        return ready - begun, ended - ready, table.nll_CB

    def _keep(self, _: str, cut: SweepCut) -> None:
        self.cut = cut


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", default="16x256", help="sequences x tokens of each")
    parser.add_argument("--num-blocks", type=int, default=2)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--repeats", type=int, default=3, help="the least of so many counts; they take turns")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--ray-address")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    checkpoint = Checkpoint.open(str(given.model))
    architecture, shapes = meta_model(checkpoint)
    num_sequences, sequence_length = map(int, given.tokens.split("x"))
    generator = torch.Generator().manual_seed(1)
    token_ids_BT = torch.randint(shapes.config.vocab_size, (num_sequences, sequence_length), generator=generator)
    dtype = resolve_dtype("auto", given.device)
    num_layers = len(architecture.decoder_layers(shapes))
    size = (num_layers, num_parameters(shapes))
    job = ScoringJob(checkpoint, *size, dtype, "perplexity", given.device, given.batch_size)
    bench = Bench(job, token_ids_BT, given.num_blocks)
    counts = [int(count) for count in given.workers.split(",")]
    starts: dict[str, Start] = {"local": bench.here}
    for count in counts:
        settings = ExecutorSettings(executor="ray", workers=count, ray_address=given.ray_address)
        starts[str(count)] = lambda settings=settings: bench.on(settings)  # type: ignore[misc]
    report(bench, starts, given.repeats)


def report(bench: Bench, starts: dict[str, Start], repeats: int) -> None:
    """Time all in turn, make sure that they give the same bits, and print."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in starts}
    expected: Tensor | None = None
    for _ in range(repeats):
        for name, start in starts.items():
            begun, steps, nll_CB = bench.timed(start)
            expected = nll_CB if expected is None else expected
            assert torch.equal(nll_CB, expected), f"{name} gives other bits"
            times[name].append((begun, steps))
            print(f"{name}: start {begun:.1f} s, steps {steps:.1f} s", flush=True)
    batches = bench.num_micro_batches
    local = min(steps for _, steps in times["local"])
    print(f"{batches} micro-batches, {bench.cut}, {torch.get_num_threads()} threads here, torch {torch.__version__}")
    print("| workers | start, s | steps, s | of local | projected |\n|---|---|---|---|---|")
    for name, measured in times.items():
        begun, steps = (min(values) for values in zip(*measured, strict=True))
        projected = f"{math.ceil(batches / int(name)) / batches:.2f}" if name != "local" else "1"
        print(f"| {name} | {begun:.1f} | {steps:.1f} | {steps / local:.2f} | {projected} |")


if __name__ == "__main__":
    main()
