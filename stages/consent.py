"""Which settings of a run let code of others run, and how a command gives them.

A run's record can be somebody else's: none of these is taken over from one. Knows no record and no stage.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

CODE_SETTINGS = ("trust_remote_code", "task_dir", "ray_address")
"""The code that comes with a model, the functions and templates of lm-eval tasks, and what Ray's protocol brings."""


def code_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a run's settings have."""
    return {name: config[name] for name in CODE_SETTINGS if config.get(name)}


def as_options(config: Mapping[str, Any]) -> str:
    """Those that a run's settings have, as they are typed in a shell."""
    words = list[str]()
    for name, value in code_settings(config).items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)
