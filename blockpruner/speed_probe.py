"""Run as a program of its own: load a model folder as a user would and time it.

It imports nothing of this project. Reads a request (JSON) from standard input and prints the measurements (JSON, one
line) on standard output; see `speed`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
"""Where Linux has a process's peak of memory set back, and tells it."""


def main() -> None:
    """Measure every case of the request."""
    request = json.load(sys.stdin)
    device = torch.device(request["device"])
    model = AutoModelForCausalLM.from_pretrained(
        request["model_dir"],
        dtype=getattr(torch, request["dtype"]),
        trust_remote_code=request["trust_remote_code"],
    )
    model.train(False)
    torch.nn.Module.to(model, device)  # the method as transformers annotates it takes no device
    answer = {
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "cases": [measured(model, device, case, request["num_repeats"]) for case in request["cases"]],
    }
    print(json.dumps(answer))  # noqa: T201


@torch.inference_mode()
def measured(model: Any, device: torch.device, case: dict[str, int], num_repeats: int) -> dict[str, Any]:
    """Run one case `num_repeats` times, after once that does not count: the seconds of each, and bytes."""
    can_tell = _forget_peak_memory(device)
    generator = torch.Generator().manual_seed(0)
    shape = (case["batch_size"], case["prompt_tokens"])
    prompt_BT = torch.randint(model.config.get_text_config().vocab_size, shape, generator=generator).to(device)
    runs = [_run(model, device, prompt_BT, case["new_tokens"]) for _ in range(1 + num_repeats)][1:]
    return {
        "prefill_s": [prefill_s for prefill_s, _, _ in runs],
        "decode_s": [decode_s for _, decode_s, _ in runs],
        "peak_memory_bytes": _peak_memory(device) if can_tell else None,
        "kv_cache_bytes": runs[0][2],
    }


def _run(model: Any, device: torch.device, prompt_BT: torch.Tensor, new_tokens: int) -> tuple[float, float, int]:
    """Seconds of the prefill and of the decoding, and bytes of the cache after the prefill."""
    started = _now(device)
    output = model(input_ids=prompt_BT, use_cache=True, logits_to_keep=1)
    prefilled = _now(device)
    cache_bytes = _cache_bytes(output.past_key_values)
    for _ in range(new_tokens):
        token_B1 = output.logits[:, -1:].argmax(dim=-1)
        output = model(input_ids=token_B1, past_key_values=output.past_key_values, use_cache=True)
    return prefilled - started, _now(device) - prefilled, cache_bytes


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _cache_bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.keys is not None)


def _forget_peak_memory(device: torch.device) -> bool:
    """Begin to look for the peak; whether this system can tell one. On a CPU only Linux can, from any moment on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _peak_memory(device: torch.device) -> int | None:
    """Bytes of the GPU's memory; on a CPU of the process, which getrusage would count from its parent's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = _STATUS.read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


if __name__ == "__main__":
    main()
