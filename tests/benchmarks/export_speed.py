"""How much faster an exported model is in use than the dense one, on a real shape with random weights.

    python -m tests.benchmarks.export_speed --share 0.25 --dtype bfloat16      # a GPU with 40 GB, 30 GB of disk
    python -m tests.benchmarks.export_speed --layers 4 --hidden 256 --device cpu

Blocks are taken out one by one, attention and feed-forward in turn and spread over the network, until this share of the
parameters is gone. Dense and exported, each is loaded and timed in processes of its own, in turn, as by
`blockpruner speed`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from blockpruner.architectures import architecture_of, block_sizes, num_parameters
from blockpruner.blocks import Block, mha, mlp
from blockpruner.checkpoint import Checkpoint
from blockpruner.export.write import write_export
from blockpruner.speed import Speed, SpeedCase, TimedModel, measure_speed
from tests.benchmarks.search_speed import WORKLOADS, random_model


def spread_blocks(sizes: dict[Block, int], num_layers: int, parameters: float) -> tuple[Block, ...]:
    """Blocks of both kinds, spread over the network, that hold at least so many parameters together."""
    halves = [layer for start in (1, 3, 0, 2) for layer in range(start, num_layers, 4)]
    removed: list[Block] = []
    for attention, feed_forward in zip(halves, reversed(halves), strict=True):
        for block in (mha(attention), mlp(feed_forward)):
            if sum(sizes[each] for each in removed) < parameters:
                removed.append(block)
    return tuple(removed)


def main() -> None:
    """Make both models, time both, and print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7b", choices=list(WORKLOADS))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--share", type=float, default=0.25, help="of the parameters, to remove")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    config = dict(WORKLOADS[arguments.shape].config)
    config["num_hidden_layers"] = arguments.layers or config["num_hidden_layers"]
    config["hidden_size"] = arguments.hidden or config["hidden_size"]
    cases = [
        SpeedCase(batch_size=batch, prompt_tokens=length, new_tokens=arguments.new_tokens)
        for batch in arguments.batch_sizes
        for length in arguments.prompt_tokens
    ]
    with tempfile.TemporaryDirectory() as folder:
        dense, pruned = Path(folder) / "dense", Path(folder) / "pruned"
        model = random_model(config, arguments.device, getattr(torch, arguments.dtype))
        architecture = architecture_of(model.config.model_type)
        total, sizes = num_parameters(model), block_sizes(architecture, model)
        removed = spread_blocks(sizes, int(config["num_hidden_layers"]), arguments.share * total)
        torch.nn.Module.to(model, "cpu").save_pretrained(dense)
        del model
        torch.cuda.empty_cache()
        written = write_export(Checkpoint.open(str(dense)), removed, pruned)
        gone = sum(sizes[block] for block in removed)
        print(f"{len(removed)} blocks, {gone / total:.1%} of {total:,} parameters, format {written.format}")
        before, after = measure_speed(
            [TimedModel(dense), TimedModel(pruned, trust_remote_code=True)],
            cases,
            device=arguments.device,
            dtype=arguments.dtype,
            num_repeats=arguments.repeats,
        )
    for pair in zip(before, after, strict=True):
        print(json.dumps(_compared(*pair)), flush=True)


def _compared(before: Speed, after: Speed) -> dict[str, float | None]:
    peaks = before.peak_memory_bytes, after.peak_memory_bytes
    return {
        "batch_size": before.batch_size,
        "prompt_tokens": before.prompt_tokens,
        "dense_prefill_ms": round(before.prefill_ms, 2),
        "prefill_speedup": round(before.prefill_ms / after.prefill_ms, 2),
        "dense_decode_tokens_per_s": round(before.decode_tokens_per_s, 1),
        "decode_speedup": round(after.decode_tokens_per_s / before.decode_tokens_per_s, 2),
        "memory": round(peaks[1] / peaks[0], 3) if peaks[0] and peaks[1] else None,
        "kv_cache": round(after.kv_cache_bytes_per_token / before.kv_cache_bytes_per_token, 3),
    }


if __name__ == "__main__":
    main()
