"""How much faster the sweep searches than the plain loop of the paper's code, on real shapes with random weights.

    python -m tests.benchmarks.search_speed 7b                      # one line of a table
    python -m tests.benchmarks.search_speed 1b small --compile off
    python -m tests.benchmarks.search_speed 7b --memory-budget 6GiB --num-blocks 4 --no-plain
    python -m tests.benchmarks.search_speed 1b --compile off --batch-size 2 --chunk 16MiB --no-plain
    python -m tests.benchmarks.search_speed MODEL_DIR --tokens 16x256 --num-blocks 8 --text FILE

Two loops with a full forward pass and full logits for each candidate (batch 2, SDPA) are timed: the reference's, with
its loss, and our plain scorer. They are timed on candidates spread over the network, and the whole search follows from
the floating-point operations that each later forward pass still has. The sweep's time is the whole search's,
from the loaded model on, compilation included. As in the search stage, the compiler starts while the model is read from
safetensors; how long that took stands beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import flows  # noqa: F401  (sets what the application sets before torch takes memory)
from blockpruner.architectures import Architecture, architecture_of, block_sizes, num_parameters
from blockpruner.blocks import Block
from blockpruner.calibration import cut_into_sequences
from blockpruner.checkpoint import Checkpoint
from blockpruner.journal import SearchJournal
from blockpruner.loading import DtypeName, load_model, load_tokenizer, meta_model
from blockpruner.masking import masked
from blockpruner.memory_size import parse_memory_size
from blockpruner.scoring import plan
from blockpruner.scoring.build import build_scorer, device_memory, is_streamed
from blockpruner.scoring.kernels import prepare
from blockpruner.scoring.metrics import metric_of
from blockpruner.scoring.plain import PlainScorer
from blockpruner.scoring.settings import MetricName, ScorerSettings
from blockpruner.scoring.sweep import SweepScorer
from blockpruner.scoring.table import ScoreTable
from blockpruner.scoring.work import Costs
from blockpruner.search import GreedySearch, SearchTarget
from blockpruner.trace import SearchStep

DTYPES: tuple[tuple[DtypeName, torch.dtype], ...] = (("float32", torch.float32), ("bfloat16", torch.bfloat16))
"""On the CPU, on a GPU."""
PLAIN_BATCH = 2
PLAIN_CANDIDATES = 8


@dataclass(frozen=True)
class Workload:
    """A shape and a task."""

    config: dict[str, int | bool]
    num_sequences: int
    sequence_length: int
    num_blocks: int


def _llama(
    vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, *, tied: bool
) -> dict[str, int | bool]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
    }


WORKLOADS = {
    "7b": Workload(_llama(32000, 4096, 11008, 32, 32, 32, tied=False), 18, 2048, 17),
    "1b": Workload(_llama(128256, 2048, 8192, 16, 32, 8, tied=True), 18, 2048, 8),
    "small": Workload(_llama(8192, 512, 1408, 24, 8, 8, tied=True), 32, 512, 12),
}


def random_model(config: dict[str, int | bool], device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama of this shape with scaled residual initialisation and embeddings of unit variance.

    As in trained models no single block then dominates the stream. With transformers' own initialisation the first
    feed-forward block does, early blocks are removed first, and there is nothing for snapshots to save.
    """
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**config))
    finally:
        torch.set_default_dtype(before)
    model.eval().requires_grad_(False)
    model.get_input_embeddings().weight.div_(0.02)
    if config["tie_word_embeddings"]:  # the head is the embedding: logits of the usual size
        model.get_submodule("model.norm").weight.mul_(0.02)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_((2 * int(config["num_hidden_layers"])) ** -0.5)
    return model


def write_random_model(config: dict[str, int | bool], folder: Path, device: str) -> None:
    """A checkpoint of `random_model`, without a tokenizer."""
    random_model(config, device, DTYPES[device != "cpu"][1]).save_pretrained(folder)
    if device != "cpu":
        torch.cuda.empty_cache()


def loaded(
    checkpoint: Checkpoint, token_ids_BT: Tensor, device: str, settings: ScorerSettings, metric: MetricName
) -> tuple[PreTrainedModel, float]:
    """The model, where the search stage would have it, and the seconds that it took."""
    architecture, shapes = meta_model(checkpoint)
    size, (dtype_name, dtype) = num_parameters(shapes), DTYPES[device != "cpu"]
    num_layers = len(architecture.decoder_layers(shapes))
    started = time.monotonic()
    prepare(device, settings, metric, num_layers=num_layers, num_parameters=size, num_tokens=token_ids_BT.numel())
    streamed = is_streamed(size * dtype.itemsize, device, settings.memory_budget)
    model = load_model(checkpoint, device="cpu" if streamed else device, dtype=dtype_name)
    return model, time.monotonic() - started


def _settings(arguments: argparse.Namespace) -> ScorerSettings:
    budget = parse_memory_size(arguments.memory_budget) if arguments.memory_budget else None
    return ScorerSettings(memory_budget=budget, compile=arguments.compile)


def _tokens(checkpoint: Checkpoint, workload: Workload | None, arguments: argparse.Namespace) -> Tensor:
    """The calibration set [B, T]: of a text, or drawn."""
    if arguments.tokens:
        num_sequences, length = map(int, arguments.tokens.split("x"))
    elif workload:
        num_sequences, length = workload.num_sequences, workload.sequence_length
    if workload:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(int(workload.config["vocab_size"]), (num_sequences, length), generator=generator)
    rows = [line.strip() for line in Path(arguments.text).read_text().splitlines() if line.strip()]
    return cut_into_sequences(rows, load_tokenizer(checkpoint), length)[:num_sequences]


@torch.inference_mode()
def reference_loss(model: PreTrainedModel, token_ids_BT: Tensor) -> list[float]:
    """Each batch's loss the way the reference takes it: cross-entropy over the full logits, vocabulary as dimension 1.

    On that layout the softmax is slow, the more so the larger the vocabulary; our own plain scorer avoids it.
    """
    losses = []
    for start in range(0, len(token_ids_BT), PLAIN_BATCH):
        batch_BT = token_ids_BT[start : start + PLAIN_BATCH].to(model.device)
        logits_BVT = model(input_ids=batch_BT, use_cache=False).logits[:, :-1].permute(0, 2, 1)
        token_nll_BT = functional.cross_entropy(logits_BVT, batch_BT[:, 1:], reduction="none")
        losses.append(float(token_nll_BT.float().mean()))
    return losses


def loop_seconds(
    architecture: Architecture,
    model: PreTrainedModel,
    token_ids_BT: Tensor,
    steps: tuple[SearchStep, ...],
    *,
    reference: bool,
) -> float:
    """A forward-per-candidate loop's time for a whole search of these steps, from a few candidates."""
    scorer, costs = PlainScorer(architecture, model, token_ids_BT, PLAIN_BATCH), Costs.of(architecture, model)
    blocks = sorted(costs.blocks)
    sampled = blocks[:: max(1, len(blocks) // PLAIN_CANDIDATES)][:PLAIN_CANDIDATES]

    def score(candidates: list[Block]) -> None:
        if not reference:
            scorer.fill((), ScoreTable.empty(candidates, len(token_ids_BT)), lambda _: None)
            return
        for block in candidates:
            with masked(architecture, model, (block,)):
                reference_loss(model, token_ids_BT)

    score(sampled[:1])
    started = time.monotonic()
    score(sampled)
    per_flop = (time.monotonic() - started) / sum(costs.forward((block,)) for block in sampled)
    removed: list[Block] = []
    flops = 0
    for step in steps:
        flops += sum(costs.forward((*removed, candidate.block)) for candidate in step.candidates)
        removed.append(step.block)
    return flops * per_flop


def sweep_search(
    architecture: Architecture,
    model: PreTrainedModel,
    token_ids_BT: Tensor,
    device: str,
    num_blocks: int,
    settings: ScorerSettings,
    metric: MetricName,
    batch_size: int | None = None,
) -> tuple[tuple[SearchStep, ...], float, SweepScorer]:
    """The search itself, with the time that it took from a loaded model on."""
    started = time.monotonic()
    scorer = build_scorer(architecture, model, token_ids_BT, device, metric_of(metric), settings, batch_size)
    assert isinstance(scorer, SweepScorer)
    print(f"  plan {scorer.plan}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        journal = SearchJournal(Path(folder), "0" * 64)
        search = GreedySearch(
            scorer, block_sizes(architecture, model), num_parameters(model), journal, metric=scorer.metric
        )
        steps = search.run(SearchTarget(num_blocks=num_blocks))
    return steps, time.monotonic() - started, scorer


def measure(name: str, workload: Workload | None, arguments: argparse.Namespace) -> dict[str, object]:
    """One line of the table."""
    device, settings = arguments.device, _settings(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if workload is not None:
            write_random_model(workload.config, Path(folder), device)
        checkpoint = Checkpoint.open(folder if workload else name)
        token_ids_BT = _tokens(checkpoint, workload, arguments)
        model, load_s = loaded(checkpoint, token_ids_BT, device, settings, arguments.metric)
    num_blocks = arguments.num_blocks or (workload.num_blocks if workload else 8)
    architecture = architecture_of(model.config.model_type).for_config(model.config)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    with device_memory(device, settings.memory_budget):
        steps, seconds, scorer = sweep_search(
            architecture, model, token_ids_BT, device, num_blocks, settings, arguments.metric, arguments.batch_size
        )
    meter = scorer.meter
    row: dict[str, object] = {
        "workload": name,
        "sequences": f"{token_ids_BT.shape[0]} x {token_ids_BT.shape[1]}",
        "blocks": num_blocks,
        "cut": scorer.plan.cut.model_dump(),
        "load_s": round(load_s, 2),
        "sweep_s": round(seconds, 2),
        "mfu": round(meter.flops / seconds / meter.peak, 3) if meter.peak else None,
        "tflops": round(meter.flops / seconds / 1e12, 2),
        "peak_tflops": round(meter.peak / 1e12) if meter.peak else None,
        "work_saved": round(meter.flops_saved / (meter.flops + meter.flops_saved), 3),
        "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if device != "cpu" else None,
        "order": " ".join(str(step.block) for step in steps),
        "step_s": [round(step.seconds, 2) for step in steps],
        "step_saved": [round(step.work_saved, 2) for step in steps],
    }
    if not arguments.no_plain:
        del scorer
        if device != "cpu":
            torch.cuda.empty_cache()
        for label, is_reference in (("reference", True), ("plain", False)):
            loop_s = loop_seconds(architecture, model, token_ids_BT, steps, reference=is_reference)
            row |= {f"{label}_s": round(loop_s, 1), f"faster_than_{label}": round(loop_s / seconds, 2)}
    return row


def main() -> None:
    """Measure what was asked for and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+", help=f"{', '.join(WORKLOADS)}, or a model folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num-blocks", type=int)
    parser.add_argument("--tokens", help="sequences x length, as 16x256")
    parser.add_argument("--text", help="a .txt to calibrate a model folder on")
    parser.add_argument("--memory-budget")
    parser.add_argument("--batch-size", type=int, help="sequences of a micro-batch of the sweep")
    parser.add_argument("--chunk", help="hidden states that run as one batch in the sweep, as 16MiB")
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--metric", default="perplexity", choices=["perplexity", "kl", "js"])
    parser.add_argument("--no-plain", action="store_true", help="do not time the plain loop")
    arguments = parser.parse_args()
    if not WORKLOADS.keys() >= set(arguments.workloads) and not (arguments.tokens and arguments.text):
        parser.error(f"a model folder needs --tokens and --text; the shapes are {', '.join(WORKLOADS)}")
    if arguments.chunk:
        plan.CUDA_CHUNK_BYTES = plan.CPU_CHUNK_BYTES = parse_memory_size(arguments.chunk)
    where = torch.cuda.get_device_name() if arguments.device != "cpu" else f"{torch.get_num_threads()} CPU threads"
    print(f"{where}, torch {torch.__version__}", flush=True)
    for name in arguments.workloads:
        print(json.dumps(measure(name, WORKLOADS.get(name), arguments)), flush=True)
        if arguments.device != "cpu":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
