"""Run as a program of its own: load an exported folder as a user would and write down its logits.

It imports nothing of this project, so that what passes here needs none of it. Reads a request and writes an answer,
both safetensors. The request: `plain_ids` [B, T]; `padded_ids` [B, P] with `padded_mask` [B, P] (left padding), and
`decode_ids` [B, N] that are then fed one by one through the cache. The answer: `plain_logits` [B, T, V] and
`cached_logits` [B, N + 1, V], the logits after the prompt and after each decoded token.
"""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def main() -> None:
    """Read the arguments, load the model, answer."""
    parser = argparse.ArgumentParser()
    for name in ("model_dir", "request", "answer"):
        parser.add_argument(name)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--has-code", action="store_true", help="run the folder's code: the exporter has written it")
    parser.add_argument("--sliding-window", type=int, help="in place of the one in config.json")
    arguments = parser.parse_args()
    settings = {} if arguments.sliding_window is None else {"sliding_window": arguments.sliding_window}
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model_dir, dtype=getattr(torch, arguments.dtype), trust_remote_code=arguments.has_code, **settings
    )
    model.train(False)
    model.to(arguments.device)
    request = {name: tensor.to(arguments.device) for name, tensor in load_file(arguments.request).items()}
    plain = model(input_ids=request["plain_ids"], use_cache=False).logits
    cached = _decode(model, request["padded_ids"], request["padded_mask"], request["decode_ids"])
    answer = {"plain_logits": plain, "cached_logits": cached}
    save_file({name: tensor.float().cpu().contiguous() for name, tensor in answer.items()}, arguments.answer)


def _decode(
    model: torch.nn.Module, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, decode_ids: torch.Tensor
) -> torch.Tensor:
    """Feed a left-padded prompt, then one token after another with the cache."""
    mask = prompt_mask
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    output = model(input_ids=prompt_ids, attention_mask=mask, position_ids=positions, use_cache=True)
    logits = [output.logits[:, -1]]
    for token_ids in decode_ids.T:
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
        output = model(
            input_ids=token_ids[:, None],
            attention_mask=mask,
            position_ids=mask.sum(dim=1, keepdim=True) - 1,
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        logits.append(output.logits[:, -1])
    return torch.stack(logits, dim=1)


if __name__ == "__main__":
    main()
