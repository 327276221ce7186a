"""A workspace with fake artifacts of every kind, and the numbers in them written out by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from stages.artifacts import ArtifactStore
from stages.contract import Runtime, Stage, StageConfig, StageManifest
from stages.runs import RunDescription, RunRecord, RunStore, StageRun
from stages.store import ResultStore

CONTRACT = """
runs(run_id, name, status, created_at, finished_at, model, model_fingerprint, num_layers, num_blocks_total,
  num_parameters, calibration, num_samples, num_sequences, sequence_length, seed, block_kinds, metric, strategy, device,
  dtype, package_version, config, error)
stage_runs(run_id, stage, fingerprint, cached, started_at, seconds, status, artifact_path, error)
search_steps(run_id, step, layer_index, block_kind, score, perplexity, num_parameters_removed, ratio, seconds)
block_scores(run_id, step, layer_index, block_kind, score, perplexity, rank, chosen)
perplexities(run_id, variant, text, num_blocks_removed, num_tokens, perplexity)
evaluations(run_id, variant, task, metric, value, stderr, num_fewshot, num_examples)
exports(run_id, format, path, num_blocks_removed, num_parameters, bytes, verified, max_logit_difference)
"""
TABLES = {name: re.findall(r"\w+", columns) for name, columns in re.findall(r"(\w+)\(([^)]*)\)", CONTRACT)}

# A search of two layers: MHA 1 goes first, then MLP 0, whose removal breaks the model. (score, perplexity) by block.
STEP_1 = {("mha", 0): (9.5, 9.5), ("mlp", 0): (8.0, 8.0), ("mha", 1): (6.0, 6.0), ("mlp", 1): ("NaN", "NaN")}
STEP_2 = {("mha", 0): ("Infinity", "Infinity"), ("mlp", 0): (7.0, 7.0), ("mlp", 1): (7.5, 7.5)}
BASELINE = {"texts": [{"text": "calibration", "num_tokens": 512, "perplexity": 5.0},
                      {"text": "wikitext2", "num_tokens": 900, "perplexity": 5.47}]}  # fmt: skip
SEARCH = {"dense_perplexity": 5.0, "num_layers": 2, "num_blocks_total": 4, "num_parameters": 1000, "num_steps": 2}
EXPORT = {"format": "stock", "num_blocks_removed": 2, "num_parameters": 700, "bytes": 2800, "kept": [], "dropped": [],
          "verified": True, "max_logit_difference": 0.0}  # fmt: skip
DENSE = {"texts": [], "metrics": [{"task": "piqa", "metric": "acc", "value": 0.78, "stderr": 0.01, "num_fewshot": 0,
                                   "num_examples": 100}]}  # fmt: skip
PRUNED = {"texts": [{"text": "wikitext2", "num_tokens": 900, "perplexity": "Infinity"}],
          "metrics": [{"task": "piqa", "metric": "acc", "value": "NaN", "stderr": None, "num_fewshot": None,
                       "num_examples": 100}]}  # fmt: skip


def trace_step(step: int, scores: Mapping[tuple[str, int], tuple[Any, Any]], chosen: tuple[str, int]) -> str:
    order = sorted(scores, key=lambda block: (isinstance(scores[block][0], str), scores[block][0]))
    candidates = [
        {"block": {"layer_index": layer, "block_kind": kind}, "score": score, "perplexity": perplexity,
         "rank": order.index((kind, layer)) + 1, "chosen": (kind, layer) == chosen}
        for (kind, layer), (score, perplexity) in scores.items()
    ]  # fmt: skip
    winner = next(candidate for candidate in candidates if candidate["chosen"])
    return json.dumps(
        {"step": step, "block": winner["block"], "score": winner["score"], "perplexity": winner["perplexity"],
         "num_parameters_removed": 150 * step, "ratio": 0.15 * step, "seconds": 0.5, "candidates": candidates}
    )  # fmt: skip


TRACE = trace_step(1, STEP_1, ("mha", 1)) + "\n" + trace_step(2, STEP_2, ("mlp", 0)) + "\n"


class AnyConfig(StageConfig):
    model_config = ConfigDict(frozen=True, extra="allow")

    salt: str


@dataclass(frozen=True)
class FakeInputs:
    model: str | None = None

    def fingerprints(self) -> Mapping[str, str]:
        return {"model": self.model} if self.model else {}


class AnyManifest(StageManifest):
    content: str = ""

    def model_dump_json(self, **_: Any) -> str:
        return self.content


class Lab:
    """A workspace with runs, artifacts and results, and what was said."""

    def __init__(self, workspace: Path, wait: float = 0.4) -> None:
        self.workspace = workspace.resolve()
        self.said: list[str] = []
        self.runs = RunStore(workspace, self.said.append)
        self.results = ResultStore(workspace / "results.duckdb", self.said.append, wait=wait)

    def artifact(
        self,
        role: str,
        manifest: dict[str, Any],
        salt: str,
        *,
        config: Mapping[str, Any] | None = None,
        model: str | None = None,
        **files: str,
    ) -> StageRun:
        """Write a whole artifact of a fake stage, and say how a run used it. `model`: what it was made from."""
        name = "calibrate" if "text:" in role or role.endswith("calibration") else role.split(":")[0]

        def run(config: AnyConfig, inputs: FakeInputs, out_dir: Path, runtime: Runtime) -> AnyManifest:
            for file, text in files.items():
                (out_dir / file.replace("__", ".")).write_text(text)
            return AnyManifest.model_construct(content=json.dumps(manifest))

        stage = Stage(name, 1, AnyManifest, run)
        settings = AnyConfig(salt=salt + role, **(config or {}))
        made = ArtifactStore(self.workspace).get_or_run(stage, settings, FakeInputs(model), Runtime())
        path = made.path.relative_to(self.workspace).as_posix()
        return StageRun(
            stage=name, label=role, role=role, fingerprint=made.fingerprint, status="completed", artifact_path=path
        )

    def run(self, name: str = "night", status: str = "completed", roles: str = "bsxdp") -> RunRecord:
        """A saved run with the stages whose initials are given (x: export; d, p: evaluate)."""
        record = self.runs.create(RunDescription(name=name, model="a model", num_layers=2, seed=42, config={"k": [2]}))
        makers: dict[str, Callable[[], StageRun]] = {
            "b": lambda: self.artifact("baseline", BASELINE, name),
            "s": lambda: self.artifact("search", SEARCH, name, trace__jsonl=TRACE),
            "x": lambda: self.artifact("export", EXPORT, name),
            "d": lambda: self.artifact("evaluate:dense", DENSE, name),
            "p": lambda: self.artifact("evaluate:pruned", PRUNED, name),
        }
        record.stages = [makers[role]() for role in roles]
        if status == "running":
            self.runs.save(record)
        else:
            self.runs.finish(record, status)  # type: ignore[arg-type]
        return record

    def dump(self) -> dict[str, list[tuple[Any, ...]]]:
        """Every table's rows, comparable: sorted, and NaN equal to itself."""
        return {
            table: sorted(tuple(map(repr, row)) for row in self.results.query(f"FROM {table}").rows) for table in TABLES
        }

    def rows(self, table: str, run: RunRecord) -> list[tuple[Any, ...]]:
        """One run's rows of a table with the contract's columns, less run_id."""
        columns = ", ".join(TABLES[table][1:])
        return self.results.query(f"SELECT {columns} FROM {table} WHERE run_id = '{run.run_id}' ORDER BY ALL").rows

    def names(self) -> set[str]:
        return {name for (name,) in self.results.query("SELECT name FROM runs").rows}
