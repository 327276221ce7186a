"""How fast and how large model folders are in use: prefill, decoding, memory. Measured in fresh processes.

Each process is `speed_probe.py`, which knows transformers and nothing of this project: it measures what a user gets.
Models that are to be compared are measured in turn and then once more in the opposite order: what else the machine
does, and how warm it gets, then weighs on all of them alike.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt
from transformers import PreTrainedModel

from blockpruner.errors import CheckpointError, ConfigurationError
from blockpruner.fresh_process import run_fresh
from blockpruner.loading import DtypeName
from blockpruner.positions import num_positions
from blockpruner.progress import Progress, ProgressCallback, silent

_PROBE = Path(__file__).with_name("speed_probe.py")


@dataclass(frozen=True)
class TimedModel:
    """A model to measure."""

    path: Path
    trust_remote_code: bool = False


class SpeedCase(BaseModel):
    """One measurement to make."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: PositiveInt
    prompt_tokens: PositiveInt
    new_tokens: PositiveInt


class Speed(BaseModel):
    """One measurement; medians over the repetitions of both processes, in each after one that does not count."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: PositiveInt
    prompt_tokens: PositiveInt
    new_tokens: PositiveInt
    prefill_ms: PositiveFloat
    """Of the whole batch's prompts, with their KV cache."""
    decode_tokens_per_s: PositiveFloat
    """Of the whole batch, one token after another through the cache."""
    peak_memory_bytes: NonNegativeInt | None
    """Of the GPU's memory; on a CPU of the process, on Linux only."""
    kv_cache_bytes_per_token: PositiveFloat
    """Of one sequence, after the prompt. A layer with a window keeps no more than the window's tokens, so that for such
    models this falls with longer prompts."""
    num_parameters: PositiveInt
    """Of the model as it is loaded; tied ones count once."""


def check_prompts(model: PreTrainedModel, prompt_tokens: Sequence[int], new_tokens: int) -> None:
    """Refuse to measure where prompt and new tokens are more than the model's table of positions has.

    Args:
        model: its shape is enough.
        prompt_tokens: lengths of the prompts.
        new_tokens: decoded after each.

    Raises:
        ConfigurationError: with the number that the model knows.
    """
    known, longest = num_positions(model), max(prompt_tokens)
    if known is not None and longest + new_tokens > known:
        raise ConfigurationError(
            f"prompts of {longest} tokens and {new_tokens} new ones are {longest + new_tokens}, but this model knows "
            f"{known} positions; give --prompt-tokens and --new-tokens that are {known} or less together"
        )


def measure_speed(
    models: Sequence[TimedModel],
    cases: Sequence[SpeedCase],
    *,
    device: str,
    dtype: DtypeName,
    num_repeats: int,
    progress: ProgressCallback = silent,
) -> list[list[Speed]]:
    """Measure every case of every model, each in two fresh processes.

    Args:
        models: what to measure and to compare.
        cases: what to measure of each.
        device: a torch device.
        dtype: of the weights.
        num_repeats: repetitions of each case in each process.
        progress: hears of every process.

    Returns:
        For every model its cases, in the order given.

    Raises:
        CheckpointError: if a process cannot load or run a model.
    """
    answers: list[list[dict[str, Any]]] = [[] for _ in models]
    turns = [*range(len(models)), *reversed(range(len(models)))]
    for done, index in enumerate(turns):
        progress(Progress(done, len(turns), "processes", models[index].path.name))
        answers[index].append(_answer(models[index], cases, device, dtype, num_repeats))
    progress(Progress(len(turns), len(turns), "processes"))
    return [[_combined(case, found, number) for number, case in enumerate(cases)] for found in answers]


def _answer(
    model: TimedModel, cases: Sequence[SpeedCase], device: str, dtype: DtypeName, num_repeats: int
) -> dict[str, Any]:
    """What one process says: see `speed_probe`."""
    request: dict[str, Any] = {
        "model_dir": str(model.path),
        "cases": [case.model_dump() for case in cases],
        "device": device,
        "dtype": dtype,
        "num_repeats": num_repeats,
        "trust_remote_code": model.trust_remote_code,
    }
    finished = run_fresh(_PROBE, given=json.dumps(request))
    if finished.returncode != 0:
        reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(f"the speed of {model.path} cannot be measured: {reason}")
    answer: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return answer


def _combined(case: SpeedCase, answers: Sequence[dict[str, Any]], number: int) -> Speed:
    """One case, from what all processes say of it."""
    found = [answer["cases"][number] for answer in answers]
    prefill_s = statistics.median(seconds for each in found for seconds in each["prefill_s"])
    decode_s = statistics.median(seconds for each in found for seconds in each["decode_s"])
    peaks = [each["peak_memory_bytes"] for each in found]
    return Speed(
        **case.model_dump(),
        prefill_ms=1e3 * prefill_s,
        decode_tokens_per_s=case.batch_size * case.new_tokens / decode_s,
        peak_memory_bytes=None if None in peaks else max(peaks),
        kv_cache_bytes_per_token=found[0]["kv_cache_bytes"] / (case.batch_size * case.prompt_tokens),
        num_parameters=answers[0]["num_parameters"],
    )
