"""Good input to spoil, and the ways to spoil it that take more than a line."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.command_line import Outcome, blockpruner

_MOST_MORE_BYTES = 8 * 2**30
"""Of address space: libraries map gigabytes of it when they are first imported, and no test is to hold them."""


@dataclass(frozen=True)
class Lab:
    """A folder with good input to spoil."""

    path: Path
    workspace: Path

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def good(self) -> list[object]:
        """Options of a model and a calibration set."""
        text = ["--calibration", self.path / "cal.txt", "--sequence-length", 16, "--num-samples", "all"]
        return ["--model", self.model, *text]

    def search(self, *changes: object) -> Outcome:
        """A search that would be fine but for the changes."""
        target = [] if {"--num-blocks", "--ratio"} & {str(change) for change in changes} else ["--num-blocks", 1]
        return self.call("search", *self.good, *target, *changes)

    def records(self) -> list[dict[str, Any]]:
        """The run records, newest first."""
        paths = (self.workspace / "runs").glob("*.json")
        records = [json.loads(path.read_text()) for path in paths]
        return sorted(records, key=lambda record: str(record["created_at"]), reverse=True)

    def call(self, *arguments: object) -> Outcome:
        return blockpruner(*arguments, "--workspace", self.workspace)

    def file(self, name: str, content: bytes) -> Path:
        path = self.path / name
        path.write_bytes(content)
        return path

    def model_without(self, name: str) -> Path:
        copy = self.path / f"without-{name}"
        shutil.copytree(self.model, copy)
        (copy / name).unlink()
        return copy


def truncated(lab: Lab) -> Outcome:
    copy = lab.path / "truncated"
    shutil.copytree(lab.model, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return lab.search("--model", copy)


def unknown_architecture(lab: Lab) -> Outcome:
    config = lab.model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "lama"}))
    return lab.search()


def layers_asked(lab: Lab, num_layers: int, command: str = "search") -> Outcome:
    """A model of four layers whose config.json says something else."""
    config = lab.model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": num_layers}))
    target = ["--num-blocks", 1] if command == "search" else []
    return lab.call(command, *lab.good, *target)


def quantized(lab: Lab, command: str) -> Outcome:
    """A model that needs `bitsandbytes`, which is not installed with this project."""
    config = lab.model / "config.json"
    asked = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": asked}))
    target = ["--num-blocks", 1] if command == "search" else []
    return lab.call(command, *lab.good, *target)


def ambiguous_run(lab: Lab) -> Outcome:
    for _ in range(2):
        lab.search()
    return lab.call("show", "20")


def recipe_with(lab: Lab, line: str) -> Outcome:
    return lab.call("run", lab.file("r.yaml", f"model: {lab.model}\nnum_blocks: 1\n{line}\n".encode()))


def recipe_of(lab: Lab, content: bytes) -> Outcome:
    return lab.call("run", lab.file("r.yaml", content))


def spoiled_file(lab: Lab, name: str, content: bytes, *options: object) -> Outcome:
    return lab.search("--calibration", lab.file(name, content), *options)


def export_beyond(lab: Lab) -> Outcome:
    lab.search("--num-blocks", 2)
    return lab.call("export", "latest", "--num-blocks", 8)


def export_onto(lab: Lab) -> Outcome:
    lab.search()
    return lab.call("export", "latest", "--output", lab.model)


def export_to(lab: Lab, output: object) -> Outcome:
    """Refused before any work, so that no artifact is there afterwards."""
    lab.search()
    outcome = lab.call("export", "latest", "--output", output)
    assert not list(lab.workspace.glob("artifacts/export/*"))
    return outcome


def sql(lab: Lab, query: str) -> Outcome:
    lab.search()
    return lab.call("sql", query)


def refused(outcome: Outcome) -> str:
    """The line that says what is wrong: the last one, and the only error; fit for any terminal."""
    lines = outcome.stderr.splitlines()
    assert outcome.status == 2, outcome
    assert outcome.stdout == ""
    assert [line for line in lines if line.startswith("Error: ")] == lines[-1:], outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert len(lines[-1]) < 5000
    assert all(character.isprintable() for character in lines[-1]), lines[-1]
    return lines[-1]


@contextmanager
def little_memory() -> Iterator[None]:
    """What would be allocated for a model of absurd size is an error at once, and no disaster for the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _MOST_MORE_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
