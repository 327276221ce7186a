"""How fast the loss kernel reads logits, beside PyTorch's own operations; on a GPU.

    python -m tests.benchmarks.loss_kernel                              # with the sizes that it uses
    python -m tests.benchmarks.loss_kernel --lanes 256,512,1024 --warps 4,8

A line for each vocabulary and choice of sizes: milliseconds, and gigabytes of logits read in a second.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch
from torch import Tensor

from blockpruner.scoring import nll_kernel
from blockpruner.scoring.loss import NLL, token_nll

NUM_TOKENS = 6141
"""Three sequences of 2048."""
VOCAB_SIZES = (8192, 32000, 50257, 128256)
"""Of 50257 not every row begins where a load may."""
REPEATS = 20


def milliseconds(nll: NLL, logits_MV: Tensor, targets_M: Tensor) -> float:
    """The mean of some calls, after one that may compile."""
    nll(logits_MV, targets_M)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(REPEATS):
        nll(logits_MV, targets_M)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / REPEATS


def report(name: str, nll: NLL, logits_MV: Tensor, targets_M: Tensor) -> None:
    """Print a line."""
    ms = milliseconds(nll, logits_MV, targets_M)
    print(f"{logits_MV.shape[1]:>7}  {name:<28} {ms:8.3f} ms  {logits_MV.nbytes / ms / 1e6:8.0f} GB/s", flush=True)


def main() -> None:
    """Measure what was asked for and print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lanes", default=str(nll_kernel._LANES), help="with commas")
    parser.add_argument("--wide", default=str(nll_kernel._WIDE), help="logits of a lane at a time, with commas")
    parser.add_argument("--warps", default=str(nll_kernel._WARPS), help="with commas")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {NUM_TOKENS} tokens, bfloat16", flush=True)
    for vocab_size in VOCAB_SIZES:
        logits_MV = torch.randn((NUM_TOKENS, vocab_size), dtype=torch.bfloat16, device="cuda")
        targets_M = torch.randint(vocab_size, (NUM_TOKENS,), device="cuda")
        report("PyTorch", token_nll, logits_MV, targets_M)
        for sizes in product(*(values.split(",") for values in (arguments.lanes, arguments.wide, arguments.warps))):
            nll_kernel._LANES, nll_kernel._WIDE, nll_kernel._WARPS = map(int, sizes)
            report("{} lanes of {}, {} warps".format(*sizes), nll_kernel.fused_token_nll, logits_MV, targets_M)


if __name__ == "__main__":
    main()
