"""Run as a program of its own: load an exported folder with MLX-LM and write down its logits.

It imports nothing of this project, nor torch or transformers' models. Reads a request and writes an answer, both
safetensors. The request: `plain_ids` [B, T]. The answer: `plain_logits` [B, T, V], and `cached_logits` of the same
shape, for which a first half is fed at once and the rest one by one through the cache.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def main() -> None:
    """Read the arguments, load the model, answer."""
    parser = argparse.ArgumentParser()
    for name in ("model_dir", "request", "answer"):
        parser.add_argument(name)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    model, _ = load_model(Path(arguments.model_dir))
    model.set_dtype(getattr(mx, arguments.dtype))
    ids = mx.load(arguments.request)["plain_ids"]
    cache, half = make_prompt_cache(model), ids.shape[1] // 2
    pieces = [ids[:, :half], *(ids[:, index : index + 1] for index in range(half, ids.shape[1]))]
    answer = {
        "plain_logits": model(ids),
        "cached_logits": mx.concatenate([model(piece, cache=cache) for piece in pieces], axis=1),
    }
    mx.save_safetensors(arguments.answer, {name: array.astype(mx.float32) for name, array in answer.items()})


if __name__ == "__main__":
    main()
