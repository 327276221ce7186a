"""Stage `evaluate`: one model's perplexity on texts and its scores on lm-eval tasks. Dense and pruned alike."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import field_validator, model_validator
from transformers import PreTrainedModel

from blockpruner.checkpoint import TOKENIZER_FILES, Checkpoint
from blockpruner.errors import ConfigurationError
from blockpruner.loading import DtypeName, load_model, load_tokenizer
from blockpruner.progress import Progress
from stages.contract import Runtime, Stage, StageConfig, StageManifest
from stages.lm_tasks import LoadedTasks, TaskSpec, lm_eval_version, loaded_tasks
from stages.task_samples import write_samples
from stages.task_scores import TaskMetric, task_metrics
from stages.text_perplexity import NamedTokens, TextPerplexity, text_fingerprints, text_perplexities

RESULTS_FILE = "lm_eval.json"
"""All that lm-eval returned, less the samples; there is none without tasks."""
SAMPLES_FILE = "samples.parquet"
"""Every question and what the model answered (see `task_samples`); there is one where it was asked for."""


class EvaluateConfig(StageConfig):
    """What to measure."""

    dtype: DtypeName = "float32"
    """Dtype of weights and activations."""
    tasks: tuple[TaskSpec, ...] = ()
    """From `lm_tasks.resolve_tasks`."""
    num_fewshot: int | None = None
    """Examples in the prompt; None: each task's own number."""
    limit: int | None = None
    """Examples of each task at most; None: all of them."""
    log_samples: bool = False
    """Keep what the model answered to each question."""
    lm_eval_version: str | None = None
    """The lm-eval that scores the tasks; filled in."""

    @model_validator(mode="before")
    @classmethod
    def _version_belongs_to_tasks(cls, fields: Any) -> Any:
        """Without tasks their settings do not matter, and are None so that the identity does not hold them."""
        if not isinstance(fields, dict):
            return fields
        if not fields.get("tasks"):
            return {**fields, "num_fewshot": None, "limit": None, "log_samples": False, "lm_eval_version": None}
        return {"lm_eval_version": lm_eval_version(), **fields}

    @field_validator("tasks")
    @classmethod
    def _order_does_not_matter(cls, tasks: tuple[TaskSpec, ...]) -> tuple[TaskSpec, ...]:
        """By name, as lm-eval's own tables are: the same tasks in another order are the same evaluation."""
        return tuple(sorted(tasks, key=lambda spec: spec.name))


@dataclass(frozen=True)
class EvaluateInputs:
    """What this stage reads."""

    model: Checkpoint
    texts: NamedTokens = ()
    """Texts by name."""
    task_dir: Path | None = None
    """Folder of the local tasks; what is used of it is identified by `TaskSpec.digest`."""
    task_data: Path | None = None
    """Folder with local data of lm-eval's tasks; identified likewise."""
    trust_remote_code: bool = False
    """Whether the user lets model and tokenizer bring code of their own."""
    has_code: bool = False
    """Whether the model is one that we exported with code, which is run in any case."""

    def fingerprints(self) -> Mapping[str, str]:
        """Model, tokenizer and texts, by content."""
        return {
            "model": self.model.fingerprint,
            "tokenizer": self.model.files_fingerprint(TOKENIZER_FILES),
            **text_fingerprints(self.texts),
        }


class EvaluateManifest(StageManifest):
    """All numbers of one model."""

    texts: tuple[TextPerplexity, ...]
    metrics: tuple[TaskMetric, ...]
    """By task; the average last."""


def run(config: EvaluateConfig, inputs: EvaluateInputs, out_dir: Path, runtime: Runtime) -> EvaluateManifest:
    """Read the tasks' data, load the model, measure the texts, then the tasks.

    Raises:
        ConfigurationError: if a task cannot be loaded, or a number is not valid.
        CheckpointError: if the model cannot be loaded.
    """
    _check(config)
    if not config.tasks:
        model = _load(config, inputs, runtime)
        return EvaluateManifest(texts=text_perplexities(model, inputs.texts, runtime), metrics=())
    runtime.progress(Progress(0, None, "tasks", "loading " + ", ".join(spec.name for spec in config.tasks)))
    where = {"task_data": inputs.task_data, "scratch_in": out_dir}
    with loaded_tasks(config.tasks, inputs.task_dir, config.num_fewshot, **where) as tasks:
        model = _load(config, inputs, runtime)
        texts = text_perplexities(model, inputs.texts, runtime)
        results = _score(config, inputs, tasks, model, runtime)
    if config.log_samples:
        write_samples(results.pop("samples"), out_dir / SAMPLES_FILE)
    _write_results(results, out_dir / RESULTS_FILE)
    return EvaluateManifest(texts=texts, metrics=task_metrics(results))


def _check(config: EvaluateConfig) -> None:
    if config.num_fewshot is not None and config.num_fewshot < 0:
        raise ConfigurationError(f"num_fewshot is {config.num_fewshot}; give 0 or more")
    if config.limit is not None and config.limit < 1:
        raise ConfigurationError(f"limit is {config.limit}; give 1 or more, or leave it out for all examples")


def _load(config: EvaluateConfig, inputs: EvaluateInputs, runtime: Runtime) -> PreTrainedModel:
    trusts = inputs.trust_remote_code or inputs.has_code
    return load_model(inputs.model, device=runtime.device, dtype=config.dtype, trust_remote_code=trusts)


def _score(
    config: EvaluateConfig, inputs: EvaluateInputs, tasks: LoadedTasks, model: PreTrainedModel, runtime: Runtime
) -> dict[str, Any]:
    from stages.lm_harness import evaluate_tasks  # imports lm-eval

    return evaluate_tasks(
        model,
        load_tokenizer(inputs.model, trust_remote_code=inputs.trust_remote_code),
        tasks,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        log_samples=config.log_samples,
        batch_size=runtime.batch_size,
        progress=runtime.progress,
    )


def _write_results(results: Mapping[str, Any], path: Path) -> None:
    """As JSON; functions as their text, NaN and infinity as strings."""
    path.write_text(json.dumps(_plain(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)


STAGE: Stage[EvaluateConfig, EvaluateInputs, EvaluateManifest] = Stage(
    name="evaluate", version=2, manifest_type=EvaluateManifest, run=run
)
