"""Train the demo's tokenizer and language model on the CPU and write them, with a model card, to `model/`.

    python data/demo/train_model.py [--steps N] [--out FOLDER]

A plain loop: AdamW, warm-up and cosine, one pass over a stream of documents that `documents.py` draws from many seeds.
The stream leaves out the held-out lines and the task's prompts. What was learned is measured by `measure.py` on the
weights as they are stored (bfloat16). It does not know BlockPruner.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from documents import document, instruction
from make_texts import HERE, Holdout
from measure import Measured, measure
from model_card import model_card
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

SEED = 20261123
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY = 1024
TOKENIZER_CHARS = 2_000_000
SEQUENCE_LENGTH, BATCH = 256, 4
HALVED_UNTIL = 0.75
"""Share of the steps that see each row as two of half the length: attention costs less, nothing is lost early on."""
PEAK_RATE, FINAL_RATE, WARMUP_STEPS = 4e-3, 1e-4, 100
WEIGHT_DECAY, CLIP_NORM = 0.05, 1.0
STEPS = 4500
INSTRUCTION_SHARE = 0.15
DOCUMENTS_PER_DRAW = 2000
SNAPSHOT_STEPS = 500
ROPE_THETA = 500.0
"""Small, as the texts are short: more of the few dimensions of a head can tell near positions apart."""
WEIGHT_STD = 0.06
"""Standard deviation of the initial weights: near 1/sqrt(hidden size), which suits a narrow model better than 0.02."""


def documents(seed: str, holdout: Holdout) -> Iterator[str]:
    """Endless training documents; none of them is held out."""
    rng = random.Random(seed)
    while True:
        text = instruction(rng)["text"] if rng.random() < INSTRUCTION_SHARE else document(rng)
        if holdout.allows(text):
            yield text


def train_tokenizer(holdout: Holdout) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts the bos token in front of a text, as Llama's does."""
    sample: list[str] = []
    chars = 0
    for text in documents(f"{SEED}-tokenizer", holdout):
        sample.append(text)
        chars += len(text)
        if chars > TOKENIZER_CHARS:
            break
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B:1", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def build_model() -> LlamaForCausalLM:
    """A deep and narrow Llama; what each block adds to the stream starts small (1/sqrt of the number of blocks)."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        initializer_range=WEIGHT_STD,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        use_cache=True,
    )
    model = LlamaForCausalLM(config)
    shrink = (2 * config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(shrink)
    return model


def sequences(tokenizer: PreTrainedTokenizerFast, holdout: Holdout) -> Iterator[list[int]]:
    """Endless rows of `SEQUENCE_LENGTH` ids, made of whole documents but for the ends.

    By turns a row begins with bos and a document, with a document alone, or within a document. Documents are joined by
    a blank line, as the calibration stage joins rows; after bos also by eos and bos, so that eos is learned.
    """
    rng = random.Random(f"{SEED}-rows")
    stream = documents(f"{SEED}-stream", holdout)
    blank = tokenizer.encode("\n\n", add_special_tokens=False)
    row: list[int] = []
    turn = 0
    while True:
        drawn = [next(stream) for _ in range(DOCUMENTS_PER_DRAW)]
        for ids in tokenizer(drawn, add_special_tokens=False)["input_ids"]:
            if not row:
                row = ([0], [], ids[rng.randrange(len(ids)) :])[turn % 3]
                row = [*row, *(ids if turn % 3 < 2 else [])]
            else:
                row += ([1, 0] if turn % 3 == 0 and rng.random() < 0.5 else blank) + ids
            if len(row) >= SEQUENCE_LENGTH:
                yield row[:SEQUENCE_LENGTH]
                row, turn = [], turn + 1


def batches(tokenizer: PreTrainedTokenizerFast, holdout: Holdout, steps: int) -> Iterator[Tensor]:
    """Token ids [B, T] for every step; early on twice as many rows of half the length."""
    rows = sequences(tokenizer, holdout)
    for step in range(steps):
        ids_BT = torch.tensor([next(rows) for _ in range(BATCH)])
        yield ids_BT.view(2 * BATCH, -1) if step < HALVED_UNTIL * steps else ids_BT


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up to the peak, then a cosine down to the final rate."""
    if step < WARMUP_STEPS:
        return PEAK_RATE * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return FINAL_RATE + (PEAK_RATE - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def _optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    matrices = [weight for weight in model.parameters() if weight.ndim == 2]
    scales = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": scales, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, ids_BT: Tensor, rate: float) -> float:
    """One update; returns the mean token NLL in nats before it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    logits_BTV = model(ids_BT, use_cache=False).logits
    loss = cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, card: str, out: Path) -> LlamaForCausalLM:
    """Write the model in bfloat16 with tokenizer and card, replacing whole files; gives what a reader would load."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".tmp-model-") as folder:
        stored = LlamaForCausalLM(model.config)
        stored.load_state_dict(model.state_dict())
        stored.bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        loaded: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")
        for path in Path(folder).iterdir():
            path.chmod(0o644)  # safetensors leaves its file to the owner alone
            path.replace(out / path.name)
    return loaded


def train(steps: int, out: Path) -> None:
    """Train, measure and write everything; snapshots on the way, so that a model is there early."""
    torch.manual_seed(SEED)
    holdout = Holdout()
    tokenizer = train_tokenizer(holdout)
    model = build_model()
    optimizer = _optimizer(model)
    print(
        f"{model.num_parameters():,} parameters, {VOCABULARY} tokens, {steps} steps of {BATCH} x {SEQUENCE_LENGTH}",
        flush=True,
    )
    start = time.monotonic()
    mean = 0.0
    for step, ids_BT in enumerate(batches(tokenizer, holdout, steps)):
        loss = train_step(model, optimizer, ids_BT, learning_rate(step, steps))
        mean = loss if step == 0 else 0.98 * mean + 0.02 * loss
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:>5}  loss {mean:.3f}  {time.monotonic() - start:6.0f} s", flush=True)
        if (step + 1) % SNAPSHOT_STEPS == 0 and step + 1 < steps:
            save(model, tokenizer, f"A snapshot after {step + 1} of {steps} steps; training goes on.\n", out)
    seconds = time.monotonic() - start
    stored = save(model, tokenizer, "", out)
    measured = measure(stored, tokenizer, holdout)
    report(measured, seconds)
    (out / "README.md").write_text(
        model_card(stored, measured, seconds, steps * BATCH * SEQUENCE_LENGTH), encoding="utf-8"
    )


def report(measured: Measured, seconds: float) -> None:
    """Print what was measured."""
    print(f"trained in {seconds / 60:.1f} minutes")
    print(
        f"held-out perplexity {measured.perplexity:.3f}; of the unigram distribution {measured.unigram_perplexity:.1f}"
    )
    print(f"multiple choice: acc {measured.accuracy:.3f}, acc_norm {measured.accuracy_norm:.3f} (chance 0.250)")
    for kind, (right, count) in sorted(measured.by_kind.items()):
        print(f"  {kind:<10} {right:>3} of {count}")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the demo's model.")
    parser.add_argument("--steps", type=int, default=STEPS, help="number of updates (default %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=HERE / "model", help="folder to write to (default: model/ beside this)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads that torch uses (default %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    train(options.steps, options.out)


if __name__ == "__main__":
    main()
