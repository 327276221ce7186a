"""The demo model's card: what it is, how it was made, what it can do. Knows the numbers only as they are given."""

from __future__ import annotations

from measure import Measured
from transformers import LlamaForCausalLM

MADE_ON = "2026-11-23"
MACHINE = "2 CPU cores"


def _kinds_table(measured: Measured) -> str:
    rows = [f"| {kind} | {right} of {count} |" for kind, (right, count) in sorted(measured.by_kind.items())]
    return "\n".join(["| kind of question | right |", "| --- | --- |", *rows])


def model_card(model: LlamaForCausalLM, measured: Measured, seconds: float, num_tokens: int) -> str:
    """The card as Markdown with a metadata head."""
    config = model.config
    shape = (
        f"{config.num_hidden_layers} layers ({2 * config.num_hidden_layers} residual blocks), hidden size "
        f"{config.hidden_size}, feed-forward size {config.intermediate_size}, {config.num_attention_heads} heads over "
        f"{config.num_key_value_heads} key-value heads, tied embeddings, {model.num_parameters():,} parameters"
    )
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The BlockPruner demo model

A deep and very small Llama, trained from scratch for BlockPruner's demo and tests: large enough in depth that removing
blocks is worth watching, small enough to ship with the source (bfloat16 safetensors).

- **Architecture**: stock `LlamaForCausalLM`; {shape}.
- **Tokenizer**: byte-level BPE of {config.vocab_size} tokens, trained on the same texts; it puts `<s>` before a text.
- **Training data**: about {num_tokens / 1e6:.1f} million tokens, drawn by `documents.py`: a small invented world of
  people, towns and animals, questions and answers, made-up scenes, stories, sums, lists, and instructions.
  `train.txt` is a sample of the same kind. The lines of `evaluation.txt` and the questions of `demo_facts` were left out.
- **Made** on {MADE_ON} with `python data/demo/train_model.py` on {MACHINE}, in {seconds / 60:.0f} minutes. The run is
  seeded; other versions of torch or another processor may differ in the last digits.
- **Licence**: Apache-2.0, like the rest of the project. The texts are the project's own.

## Measured (float32, the stored weights)

| | |
| --- | --- |
| perplexity on `evaluation.txt` ({measured.num_tokens:,} tokens in rows of 256) | {measured.perplexity:.3f} |
| the same tokens by the token frequencies of `train.txt` (unigram, add-one) | {measured.unigram_perplexity:.1f} |
| `demo_facts`, {measured.num_questions} questions, 4 choices: acc (chance 0.25) | {measured.accuracy:.3f} |
| `demo_facts`: acc_norm | {measured.accuracy_norm:.3f} |

{_kinds_table(measured)}

## Intended use and limits

It is for trying and testing BlockPruner: a real language model that a laptop can calibrate, search, prune, export and
evaluate in minutes. It knows about six hundred English words and one invented world; outside of these it is useless,
its answers are no statements about real people or places, and how it loses quality under pruning says little about
large models.
"""
