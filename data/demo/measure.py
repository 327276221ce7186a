"""What the demo's model has learned, in plain torch: held-out and unigram perplexity, multiple-choice accuracy.

It does not know how the model was trained, nor lm-eval; lm-eval's own numbers for the task agree with these.
Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from make_texts import Holdout, sample_corpus
from questions import Question
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

EVALUATION_LENGTH = 256


@dataclass(frozen=True)
class Measured:
    """The numbers of the model card."""

    perplexity: float
    """exp of the mean over sequences of mean token NLL, on `evaluation.txt`."""
    unigram_perplexity: float
    """The same tokens under the token frequencies of `train.txt` with add-one smoothing."""
    num_tokens: int
    accuracy: float
    accuracy_norm: float
    num_questions: int
    by_kind: dict[str, tuple[int, int]]
    """Kind of question -> (right, asked)."""


def _ids(tokenizer: PreTrainedTokenizerFast, lines: list[str]) -> list[int]:
    """The lines joined by a blank line, tokenized once."""
    ids: list[int] = tokenizer("\n\n".join(lines))["input_ids"]
    return ids


def _sequences(ids: list[int]) -> Tensor:
    """[B, T] with the tail dropped."""
    count = len(ids) // EVALUATION_LENGTH
    return torch.tensor(ids[: count * EVALUATION_LENGTH]).view(count, EVALUATION_LENGTH)


@torch.no_grad()
def held_out_perplexity(model: LlamaForCausalLM, ids_BT: Tensor) -> float:
    """exp of the mean NLL of all tokens but each sequence's first."""
    logits_BTV = torch.cat([model(rows).logits[:, :-1] for rows in ids_BT.split(8)])
    return math.exp(cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten()).item())


def unigram_perplexity(train_ids: list[int], ids_BT: Tensor, vocabulary: int) -> float:
    """The same tokens under add-one smoothed frequencies of the training sample."""
    counts = Counter(train_ids)
    total = len(train_ids) + vocabulary
    scored = ids_BT[:, 1:].flatten().tolist()
    return math.exp(-sum(math.log((counts[token] + 1) / total) for token in scored) / len(scored))


@torch.no_grad()
def choice_scores(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: Question) -> list[float]:
    """Log-likelihood in nats of every choice after the prompt."""
    prompt = tokenizer(question["prompt"])["input_ids"]
    scores = []
    for choice in question["choices"]:
        ids = tokenizer(f"{question['prompt']} {choice}", return_tensors="pt")["input_ids"]
        nll = cross_entropy(model(ids).logits[0, len(prompt) - 1 : -1], ids[0, len(prompt) :], reduction="sum")
        scores.append(-nll.item())
    return scores


def _best(scores: list[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, holdout: Holdout) -> Measured:
    """All numbers; the model should be the one that was stored, in float32."""
    model.eval()
    ids_BT = _sequences(_ids(tokenizer, holdout.lines))
    right = norm_right = 0
    by_kind: dict[str, tuple[int, int]] = {}
    for question in holdout.questions:
        scores = choice_scores(model, tokenizer, question)
        per_byte = [score / len(text.encode()) for score, text in zip(scores, question["choices"], strict=True)]
        hit = _best(scores) == question["answer"]
        right, norm_right = right + hit, norm_right + (_best(per_byte) == question["answer"])
        so_far, asked = by_kind.get(question["kind"], (0, 0))
        by_kind[question["kind"]] = (so_far + hit, asked + 1)
    count = len(holdout.questions)
    unigram = unigram_perplexity(_ids(tokenizer, sample_corpus(holdout)), ids_BT, len(tokenizer))
    return Measured(
        held_out_perplexity(model, ids_BT), unigram, ids_BT.numel(), right / count, norm_right / count, count, by_kind
    )
