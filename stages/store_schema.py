"""The tables of results.duckdb: their columns, the SQL that makes and fills them, and a row of each as a Python type.

Knows SQL text only; `store` runs it, `store_rows` makes the rows. Instants are UTC, without a time zone in the column,
so that reading them needs no time zone data. There are no keys: a run's rows are always replaced together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

from stages.store_views import VIEWS

TABLES: Mapping[str, Mapping[str, str]] = {
    "runs": {
        "run_id": "VARCHAR NOT NULL",
        "name": "VARCHAR",
        "status": "VARCHAR NOT NULL",
        "created_at": "TIMESTAMP NOT NULL",
        "finished_at": "TIMESTAMP",
        "model": "VARCHAR",
        "model_fingerprint": "VARCHAR",
        "num_layers": "BIGINT",
        "num_blocks_total": "BIGINT",
        "num_parameters": "BIGINT",
        "calibration": "VARCHAR",
        "num_samples": "BIGINT",
        "num_sequences": "BIGINT",
        "sequence_length": "BIGINT",
        "seed": "BIGINT",
        "block_kinds": "VARCHAR",
        "metric": "VARCHAR",
        "strategy": "VARCHAR",
        "device": "VARCHAR",
        "dtype": "VARCHAR",
        "package_version": "VARCHAR NOT NULL",
        "config": "JSON NOT NULL",
        "error": "VARCHAR",
        "num_blocks_removed": "BIGINT",
        "host": "VARCHAR NOT NULL",
        "record_digest": "VARCHAR NOT NULL",
        "comparison": "VARCHAR",
        "search_family": "VARCHAR",
        "settings": "VARCHAR",
        "external": "VARCHAR",
        "num_parameters_left": "BIGINT",
        "pruned_fingerprint": "VARCHAR",
    },
    "stage_runs": {
        "run_id": "VARCHAR NOT NULL",
        "stage": "VARCHAR NOT NULL",
        "fingerprint": "VARCHAR",
        "cached": "BOOLEAN NOT NULL",
        "started_at": "TIMESTAMP NOT NULL",
        "seconds": "DOUBLE NOT NULL",
        "status": "VARCHAR NOT NULL",
        "artifact_path": "VARCHAR",
        "error": "VARCHAR",
        "label": "VARCHAR NOT NULL",
        "role": "VARCHAR NOT NULL",
        "token_digest": "VARCHAR",
    },
    "search_steps": {
        "run_id": "VARCHAR NOT NULL",
        "step": "INTEGER NOT NULL",
        "layer_index": "INTEGER NOT NULL",
        "block_kind": "VARCHAR NOT NULL",
        "score": "DOUBLE NOT NULL",
        "perplexity": "DOUBLE NOT NULL",
        "num_parameters_removed": "BIGINT NOT NULL",
        "ratio": "DOUBLE NOT NULL",
        "seconds": "DOUBLE NOT NULL",
        "work_saved": "DOUBLE NOT NULL",
        "strategy": "VARCHAR",
        "num_blocks_removed": "INTEGER",
    },
    "block_scores": {
        "run_id": "VARCHAR NOT NULL",
        "step": "INTEGER NOT NULL",
        "layer_index": "INTEGER NOT NULL",
        "block_kind": "VARCHAR NOT NULL",
        "score": "DOUBLE NOT NULL",
        "perplexity": "DOUBLE",
        "rank": "INTEGER NOT NULL",
        "chosen": "BOOLEAN NOT NULL",
        "tied": "BOOLEAN NOT NULL",
    },
    "perplexities": {
        "run_id": "VARCHAR NOT NULL",
        "variant": "VARCHAR NOT NULL",
        "text": "VARCHAR NOT NULL",
        "num_blocks_removed": "BIGINT",
        "num_tokens": "BIGINT",
        "perplexity": "DOUBLE NOT NULL",
    },
    "evaluations": {
        "run_id": "VARCHAR NOT NULL",
        "variant": "VARCHAR NOT NULL",
        "task": "VARCHAR NOT NULL",
        "metric": "VARCHAR NOT NULL",
        "value": "DOUBLE",
        "stderr": "DOUBLE",
        "num_fewshot": "BIGINT",
        "num_examples": "BIGINT",
    },
    # Only exports that are there, so `verified` is true: one that fails the comparison is deleted, and its row of
    # `stage_runs` has the status 'failed' and an `error` with the difference of the logits.
    "exports": {
        "run_id": "VARCHAR NOT NULL",
        "format": "VARCHAR NOT NULL",
        "path": "VARCHAR NOT NULL",
        "num_blocks_removed": "BIGINT NOT NULL",
        "num_parameters": "BIGINT NOT NULL",
        "bytes": "BIGINT NOT NULL",
        "verified": "BOOLEAN NOT NULL",
        "max_logit_difference": "DOUBLE",
        "verified_with": "VARCHAR",
    },
    "speed": {
        "run_id": "VARCHAR NOT NULL",
        "variant": "VARCHAR NOT NULL",
        "batch_size": "BIGINT NOT NULL",
        "prompt_tokens": "BIGINT NOT NULL",
        "new_tokens": "BIGINT NOT NULL",
        "prefill_ms": "DOUBLE NOT NULL",
        "decode_tokens_per_s": "DOUBLE NOT NULL",
        "peak_memory_bytes": "BIGINT",
        "kv_cache_bytes_per_token": "DOUBLE NOT NULL",
        "machine": "VARCHAR NOT NULL",
        "num_parameters": "BIGINT",
        "weight_bytes": "BIGINT",
    },
}
"""Column name to SQL type, by table."""

INFO_TABLE = "schema_info"

SKIPPED_TABLE = "skipped_runs"
"""Runs whose record holds what no column can, with the digest of that record: tried again when it has changed."""

_SKIPPED_COLUMNS = {"run_id": "VARCHAR NOT NULL", "record_digest": "VARCHAR NOT NULL", "reason": "VARCHAR NOT NULL"}

_ALL_TABLES = {**TABLES, SKIPPED_TABLE: _SKIPPED_COLUMNS}

COLUMNS = frozenset((table, name, kind) for table, columns in _ALL_TABLES.items() for name, kind in columns.items())
"""Table, column and SQL type of everything that is written."""

DEFINITIONS: Mapping[str, str] = {
    **{
        table: f"CREATE TABLE {table} (\n    " + ",\n    ".join(map(" ".join, columns.items())) + "\n);"
        for table, columns in _ALL_TABLES.items()
    },
    **{view: f"CREATE VIEW {view} AS\n{query.strip()};" for view, query in VIEWS.items()},
}
"""The statement that makes each table and view, by name."""

CREATE = "\n".join(DEFINITIONS.values())
"""Makes every table and view of an empty database."""

SCHEMA_DIGEST = hashlib.sha256(CREATE.encode()).hexdigest()
"""Kept in INFO_TABLE: a database with other tables or views is made anew."""


def delete_statement(table: str) -> str:
    """Deletes one run's rows; its parameter is the run id."""
    return f"DELETE FROM {table} WHERE run_id = ?"


def insert_statement(table: str) -> str:
    """Inserts many rows at once; its parameters are the columns, each a list of values."""
    kinds = (kind.removesuffix(" NOT NULL") for kind in TABLES[table].values())
    return f"INSERT INTO {table} ({', '.join(TABLES[table])}) SELECT {', '.join(f'unnest(?::{k}[])' for k in kinds)}"


class RunRow(NamedTuple):
    """One run."""

    run_id: str
    name: str | None
    status: str
    created_at: datetime
    finished_at: datetime | None
    model: str | None
    model_fingerprint: str | None
    num_layers: int | None
    num_blocks_total: int | None
    num_parameters: int | None
    calibration: str | None
    num_samples: int | None
    num_sequences: int | None
    sequence_length: int | None
    seed: int | None
    block_kinds: str | None
    metric: str | None
    strategy: str | None
    device: str | None
    dtype: str | None
    package_version: str
    config: str
    """JSON."""
    error: str | None
    num_blocks_removed: int | None
    host: str
    record_digest: str
    """sha256 of the run record that these rows were made from."""
    comparison: str | None = None
    """The comparison that the run is a row of."""
    search_family: str | None = None
    """The same for two searches that differ in how far they go alone: the fingerprint of their checkpoints."""
    settings: str | None = None
    """What else the search was told, beside strategy, metric and kinds of blocks; None: nothing."""
    external: str | None = None
    """The folder of the pruned model, where something else has pruned it."""
    num_parameters_left: int | None = None
    """Of that model."""
    pruned_fingerprint: str | None = None
    """Identifies the pruned model by its content, where it was evaluated."""


class StageRow(NamedTuple):
    """One stage of a run."""

    run_id: str
    stage: str
    fingerprint: str | None
    cached: bool
    started_at: datetime
    seconds: float
    status: str
    artifact_path: str | None
    error: str | None
    label: str
    role: str
    token_digest: str | None = None
    """Of the stage that cuts a text: identifies the tokens."""


class StepRow(NamedTuple):
    """One block that a run's search removed; blocks that left together have a row each, with the same step."""

    run_id: str
    step: int
    layer_index: int
    block_kind: str
    score: float
    perplexity: float
    num_parameters_removed: int
    ratio: float
    seconds: float
    work_saved: float = 0.0
    strategy: str | None = None
    num_blocks_removed: int | None = None
    """By this step and all before it."""


class ScoreRow(NamedTuple):
    """What one step of the search found for one block; blocks that would leave together have a row each."""

    run_id: str
    step: int
    layer_index: int
    block_kind: str
    score: float
    perplexity: float | None
    """NULL where the strategy did not measure it."""
    rank: int
    chosen: bool
    tied: bool


class PerplexityRow(NamedTuple):
    """The perplexity of the dense or the pruned model on one text."""

    run_id: str
    variant: str
    text: str
    num_blocks_removed: int | None
    num_tokens: int | None
    perplexity: float


class EvaluationRow(NamedTuple):
    """One metric of one task, for the dense or the pruned model."""

    run_id: str
    variant: str
    task: str
    metric: str
    value: float | None
    stderr: float | None
    num_fewshot: int | None
    num_examples: int | None


class ExportRow(NamedTuple):
    """One exported model."""

    run_id: str
    format: str
    path: str
    num_blocks_removed: int
    num_parameters: int
    bytes: int
    verified: bool
    max_logit_difference: float | None
    verified_with: str | None = None


class SpeedRow(NamedTuple):
    """One timing of the dense or the pruned model."""

    run_id: str
    variant: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    prefill_ms: float
    decode_tokens_per_s: float
    peak_memory_bytes: int | None
    """None where the system does not tell it."""
    kv_cache_bytes_per_token: float
    """Of one sequence, after the prompt. Where layers have windows it falls with longer prompts, for such a layer keeps
    no more than its window."""
    machine: str
    num_parameters: int | None = None
    """Of the variant, as it is loaded; None in rows of earlier versions."""
    weight_bytes: int | None = None
    """Of the variant's weights, on disk; None likewise."""
