"""The copy of the exported models that `--output` asks for: there whole or not at all, and refused before any work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from blockpruner.errors import ConfigurationError
from stages.workspace import Workspace


def require_new_folder(output: Path, workspace: Workspace) -> None:
    """Make sure that a new folder can be put here, as far as that can be known beforehand. Makes nothing.

    Args:
        output: the new folder.
        workspace: among its results none can be.

    Raises:
        ConfigurationError: saying what is in the way.
    """
    if workspace.owns(output):
        raise ConfigurationError(
            f"{output} is a place for results in the workspace {workspace.path}; give --output another folder"
        )
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise ConfigurationError(f"{output} is there already; give --output a new folder")
    if output.exists() and (output.samefile(Path.cwd()) or output.is_mount()):
        kind = "a mount point" if output.is_mount() else "the current folder"
        raise ConfigurationError(f"{output} is {kind}, and cannot be replaced; give --output a new folder")
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ConfigurationError(f"{output} cannot be made: {above} is a file; give --output a new folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"{output} cannot be made: {above} cannot be written; give --output a folder that can be"
        )


def copy_models(sources: Mapping[str, Path], output: Path) -> None:
    """Copy folders into a new one so that the whole of it is there or nothing.

    Args:
        sources: the folders by their names within the new one; the name '.' is the new folder itself.
        output: the new folder.

    Raises:
        ConfigurationError: if the system refuses.
    """
    unfinished = output.with_name(f".{output.name[:40]}.unfinished")  # with a long name, still one that can be
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        for name, source in sources.items():
            shutil.copytree(source, unfinished / name)
        unfinished.rename(output)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        what, kept = ("models", "they are") if len(sources) > 1 else ("model", "it is")
        raise ConfigurationError(
            f"the {what} cannot be copied to {output}: {_reason(error)}; {kept} kept in "
            f"{' and '.join(map(str, sources.values()))}: give the same command again when that is mended"
        ) from error


def _reason(error: OSError) -> object:
    """The first of the reasons that `shutil` gathers, or the system's own."""
    gathered = error.args[0] if isinstance(error, shutil.Error) and error.args else None
    return gathered[0][-1] if isinstance(gathered, list) and gathered else error.strerror or error
