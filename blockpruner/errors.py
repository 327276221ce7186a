"""The errors a user can cause. Each message says what came, what is valid and what to do, on one line.

The command line shows such an error as that one line and exits with status 2. Everything else that is raised is a
defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class BlockPrunerError(Exception):
    """Base of every error whose cause is the user's input or the user's machine."""


class CheckpointError(BlockPrunerError):
    """A model folder or hub id cannot be used: nothing there, parts missing, files damaged."""


class UnsupportedArchitectureError(BlockPrunerError):
    """The model's architecture is not in the table, or can never lose a block."""


class TextSourceError(BlockPrunerError):
    """A calibration or evaluation text is missing, empty, unreadable or too short."""


class ConfigurationError(BlockPrunerError):
    """A setting has a value that is not valid, alone or together with another."""


class ArtifactError(BlockPrunerError):
    """A stored artifact, checkpoint or run record cannot be used."""


class ExportError(BlockPrunerError):
    """The surviving blocks cannot be written in the format asked for, or the written model is not the same model."""


class ExecutorError(BlockPrunerError):
    """Workers elsewhere cannot be had, or were lost."""


class StoreError(BlockPrunerError):
    """The results database cannot be opened, or a query failed."""


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_disk_full(error: BaseException) -> bool:
    """Whether there is no space, or none that this user or process may take.

    Also where a library written in another language put the operating system's words into an error of its own.
    """
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return "No space left on device" in str(error) or any(f"(os error {number})" in str(error) for number in _FULL)


def one_line(error: BaseException) -> str:
    """What an error of others says, on one line of at most 300 characters; its type where it says nothing."""
    text = " ".join(_said(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _said(error: BaseException) -> str:
    """Of what pydantic found, the first: it would say all of it, with addresses of its documentation."""
    from pydantic import ValidationError  # --help, which imports this module, takes no time for it

    found = isinstance(error, ValidationError) and error.errors(
        include_url=False, include_context=False, include_input=False
    )
    if not found:
        return str(error)
    return ": ".join(filter(None, (".".join(map(str, found[0]["loc"])), found[0]["msg"])))


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint ``; did you mean 'x'?`` for a misspelt word, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""
