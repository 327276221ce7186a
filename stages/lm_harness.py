"""One call of lm-eval's `simple_evaluate` on a model in memory, with our progress and nothing on standard output.

Importing this module imports lm-eval, which takes seconds: import it where it is used.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from lm_eval import evaluator
from lm_eval.api import task as task_module
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blockpruner.progress import Progress, ProgressCallback
from stages.lm_tasks import LoadedTasks

_BATCH_SIZE = 8
"""Requests in one forward pass on a CPU where the caller leaves it to us; lm-eval sorts them by length. There is no
finding out there: a machine that has too little memory ends the process."""
_BOOTSTRAP_ITERS = 1000
"""Draws for the standard errors that have no formula (F1, perplexity, ...); accuracy's has one."""


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: LoadedTasks,
    *,
    num_fewshot: int | None,
    limit: int | None,
    log_samples: bool,
    batch_size: int | Literal["auto"] | None,
    progress: ProgressCallback,
) -> dict[str, Any]:
    """All that lm-eval returns. Its seeds are fixed, so the same call gives the same numbers.

    Args:
        model: a causal LM in eval mode.
        tokenizer: the model's.
        tasks: loaded tasks; lm-eval changes them, so they serve once.
        num_fewshot: examples in the prompt; None: each task's own number. A task that fixes it at 0 stays at 0.
        limit: examples of each task at most; None: all.
        log_samples: whether what the model answered to each question is among it.
        batch_size: requests in one forward pass; 'auto': as many as lm-eval finds to fit, at most 64; None: auto on a
            GPU, `_BATCH_SIZE` on a CPU.
        progress: told of requests as they are done.
    """
    chosen = batch_size or ("auto" if model.device.type == "cuda" else _BATCH_SIZE)
    with _quiet():
        return dict(
            evaluator.simple_evaluate(
                model=_ReportingLM(model, tokenizer, chosen, progress),
                tasks=tasks.items,
                task_manager=tasks.manager,
                num_fewshot=num_fewshot,
                limit=limit,
                bootstrap_iters=_BOOTSTRAP_ITERS,
                log_samples=log_samples,
            )
        )


class _ReportingLM(HFLM):  # type: ignore[misc]  # lm-eval has no type information
    """lm-eval's wrapper of a transformers model, which draws bars of its own; this one reports to us instead."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | Literal["auto"],
        progress: ProgressCallback,
    ) -> None:
        with _errors_only():
            super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
        self._progress = progress
        self._finished = 0
        self._under_way = 0
        self._total = 0
        self._trying = False

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """See HFLM."""
        self._begin(len(requests))
        results: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        self._end(len(requests))
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """See HFLM."""
        self._begin(len(requests))
        results: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        self._end(len(requests))
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """See HFLM."""
        self._begin(len(requests))
        results: list[str] = super().generate_until(requests, disable_tqdm=True)
        self._end(len(requests))
        return results

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None) -> Any:
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        self._trying = True  # what it runs to find out is no request
        try:
            return int(super()._detect_batch_size(requests, pos))
        finally:
            self._trying = False

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        logits: Tensor = super()._model_call(inps, attn_mask, labels)
        self._advance(len(inps))
        return logits

    def _model_generate(self, context: Tensor, *arguments: Any, **options: Any) -> Any:
        output = super()._model_generate(context, *arguments, **options)
        self._advance(len(context))
        return output

    def _begin(self, num_requests: int) -> None:
        self._total += num_requests
        self._under_way = 0

    def _advance(self, num_rows: int) -> None:
        # Requests that share a forward pass are fewer rows, long ones are several: an estimate, until they are done.
        self._under_way += 0 if self._trying else num_rows
        done = min(self._finished + self._under_way, self._total - 1)
        self._progress(Progress(done, self._total, "requests", "lm-eval"))

    def _end(self, num_requests: int) -> None:
        self._finished += num_requests
        self._progress(Progress(self._finished, self._total, "requests", "lm-eval"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send what lm-eval prints to standard error, and leave out its bars and its look at the working folder's git."""
    bar, commit = task_module.tqdm, evaluator.get_git_commit_hash
    task_module.tqdm = partial(bar, disable=True)
    evaluator.get_git_commit_hash = lambda: None  # outside a repository git complains on standard error
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        task_module.tqdm, evaluator.get_git_commit_hash = bar, commit


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Without lm-eval's warnings that a model in memory is not a name: that is what we want."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
