"""The model code that an export brings along: the exporter's own, which is run without being trusted, and no other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import CheckpointError

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class ModelCode:
    """What a format writes beside the weights."""

    files: Mapping[str, str]
    """Content by name."""
    auto_map: Mapping[str, str]
    """The setting that points to it."""

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the files and return the settings."""
        for name, text in self.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        return {"auto_map": dict(self.auto_map)}

    def check(self, checkpoint: Checkpoint) -> None:
        """Make sure that an exported model holds this code and no other: whoever hands an artifact on can change it.

        Raises:
            CheckpointError: if it does not.
        """
        found = {path.relative_to(checkpoint.path).as_posix(): path for path in checkpoint.path.rglob("*.py")}
        same_files = found.keys() == self.files.keys() and all(
            path.read_bytes() == self.files[name].encode() for name, path in found.items()
        )
        if not same_files or checkpoint.config.get("auto_map") != self.auto_map:
            raise CheckpointError(
                f"{checkpoint.path} holds model code that this version's exporter does not write; it is not run: "
                f"remove {checkpoint.path.parent} and give the same command again to export the model anew"
            )
