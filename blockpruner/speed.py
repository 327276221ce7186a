"""How fast and how large a model folder is in use: prefill, decoding, memory. Measured in a fresh process.

The process is `speed_probe.py`, which knows transformers and nothing of this project: it measures what a user gets.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt

from blockpruner.errors import CheckpointError
from blockpruner.loading import DtypeName

_PROBE = Path(__file__).with_name("speed_probe.py")


class SpeedCase(BaseModel):
    """One measurement to make."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: PositiveInt
    prompt_tokens: PositiveInt
    new_tokens: PositiveInt


class Speed(BaseModel):
    """One measurement; medians over repetitions, after one that does not count."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: PositiveInt
    prompt_tokens: PositiveInt
    new_tokens: PositiveInt
    prefill_ms: PositiveFloat
    """Of the whole batch's prompts, with their KV cache."""
    decode_tokens_per_s: PositiveFloat
    """Of the whole batch, one token after another through the cache."""
    peak_memory_bytes: NonNegativeInt
    """Of the GPU's memory; on a CPU of the process."""
    kv_cache_bytes_per_token: PositiveFloat
    """Of one sequence."""


def measure_speed(
    model_dir: Path, cases: list[SpeedCase], *, device: str, dtype: DtypeName, num_repeats: int, trust_remote_code: bool
) -> list[Speed]:
    """Load a model in a fresh process and measure every case.

    Raises:
        CheckpointError: if the process cannot load or run the model.
    """
    request: dict[str, Any] = {
        "model_dir": str(model_dir),
        "cases": [case.model_dump() for case in cases],
        "device": device,
        "dtype": dtype,
        "num_repeats": num_repeats,
        "trust_remote_code": trust_remote_code,
    }
    # -P: the script's own folder must not be searched for modules.
    command = [sys.executable, "-P", str(_PROBE)]
    finished = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(f"the speed of {model_dir} cannot be measured: {reason}")
    return [Speed.model_validate(row) for row in json.loads(finished.stdout.splitlines()[-1])]
