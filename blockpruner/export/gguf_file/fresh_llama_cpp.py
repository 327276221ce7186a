"""Run as a program of its own: load a GGUF file in llama.cpp, as a user would, and write down its logits.

It imports nothing of this project; a process of its own survives what llama.cpp's assertions do to theirs. Request and
answer are as in `fresh_load`: rows padded on the left are given without their padding, which llama.cpp does not know,
prompt first and then token by token through its cache.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import numpy as np
from gguf import GGUFReader
from safetensors.numpy import load_file, save_file

# Else a failed assertion's last lines are a debugger's, and not what failed.
os.environ["GGML_NO_BACKTRACE"] = "1"
from llama_cpp import GGML_TYPE_F32, Llama


def main() -> None:
    """Read the arguments, load the model, answer."""
    parser = argparse.ArgumentParser()
    for name in ("model", "request", "answer"):
        parser.add_argument(name)
    parser.add_argument("--sliding-window", type=int, help="in place of the file's own")
    arguments = parser.parse_args()
    request = load_file(arguments.request)
    longest = request["padded_ids"].shape[1] + request["decode_ids"].shape[1]
    model = Llama(
        arguments.model,
        n_ctx=max(64, longest),
        n_gpu_layers=0,
        logits_all=True,
        # The cache's own default rounds keys and values to half precision.
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        kv_overrides=_overrides(arguments.model, arguments.sliding_window),
        verbose=False,
    )
    plain = [_logits(model, [row]) for row in request["plain_ids"]]
    num_answers = request["decode_ids"].shape[1] + 1
    cached = [
        _logits(model, [prompt[mask == 1], *decoded[:, None]])[-num_answers:]
        for prompt, mask, decoded in zip(
            request["padded_ids"], request["padded_mask"], request["decode_ids"], strict=True
        )
    ]
    save_file({"plain_logits": np.stack(plain), "cached_logits": np.stack(cached)}, arguments.answer)


def _overrides(path: str, sliding_window: int | None) -> dict[str, bool | int | float | str] | None:
    if sliding_window is None:
        return None
    arch = GGUFReader(path).fields["general.architecture"].contents()
    return {f"{arch}.attention.sliding_window": sliding_window}


def _logits(model: Any, pieces: list[Any]) -> Any:
    """Logits [T, V] after each token of a sequence that is fed in pieces."""
    model.reset()
    for piece in pieces:
        model.eval(piece.tolist())
    return np.array(model.scores[: model.n_tokens], dtype=np.float32)


if __name__ == "__main__":
    main()
