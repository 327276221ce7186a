"""A stage that writes a word and can be made to wait; what tests of the artifact store run."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.artifacts import Artifact, ArtifactStore
from stages.contract import Runtime, Stage, StageConfig, StageManifest


class EchoConfig(StageConfig):
    word: str = "hello"
    num_times: int = 3


@dataclass(frozen=True)
class EchoInputs:
    folder: Path
    """Where the stage says that it was called, and looks for what it shall do; not part of the identity."""
    source: str = "a source"

    def fingerprints(self) -> Mapping[str, str]:
        return {"source": hashlib.sha256(self.source.encode()).hexdigest()}

    def calls(self) -> int:
        path = self.folder / "calls"
        return len(path.read_text().splitlines()) if path.exists() else 0


class EchoManifest(StageManifest):
    length: int
    scores: tuple[float, ...]


EchoStage = Stage[EchoConfig, EchoInputs, EchoManifest]


def run_echo(config: EchoConfig, inputs: EchoInputs, out_dir: Path, runtime: Runtime) -> EchoManifest:
    with (inputs.folder / "calls").open("a") as file:
        file.write(f"{os.getpid()}\n")
    (out_dir / "deep" / "er").mkdir(parents=True)
    (out_dir / "words.txt").write_text(config.word * config.num_times)
    (out_dir / "deep" / "er" / "bytes").write_bytes(bytes(range(256)))
    while (inputs.folder / "hold").exists():
        time.sleep(0.01)
    return EchoManifest(length=len(config.word) * config.num_times, scores=(0.1, math.nan, math.inf, -math.inf))


ECHO: EchoStage = Stage("echo", 1, EchoManifest, run_echo)


def variant(run: Callable[[EchoConfig, EchoInputs, Path, Runtime], EchoManifest], **changes: Any) -> EchoStage:
    return Stage("echo", 1, EchoManifest, run, **changes)


class Bench:
    """A workspace, the inputs, and what was said."""

    def __init__(self, folder: Path) -> None:
        self.workspace = folder / "workspace"
        self.inputs = EchoInputs(folder)
        self.said: list[str] = []
        self.store = ArtifactStore(self.workspace, self.said.append)

    def get(self, stage: EchoStage = ECHO, **config: Any) -> Artifact[EchoManifest]:
        return self.store.get_or_run(stage, EchoConfig(**config), self.inputs, Runtime())

    def unfinished(self) -> list[Path]:
        return list(self.workspace.glob("artifacts/*/.*"))

    def hold(self) -> Path:
        """Make the stage wait, once it has written its files, until this file is gone."""
        (self.inputs.folder / "hold").touch()
        return self.inputs.folder / "hold"
