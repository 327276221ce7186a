"""The report of some runs, put together and written."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import blockpruner
from blockpruner.paths import naming
from flows.paper_figures import paper_figures
from flows.report.bars import speed_bars, stage_bars, task_bars
from flows.report.blocks import HOW_TO_READ, removal_map, score_map
from flows.report.curves import CALIBRATION, held_out_curves, search_curves
from flows.report.data import ReportRun, distinct_searches, report_runs
from flows.report.page import Card, Page, RunDetails, Section, render
from flows.report.paper import comparisons
from flows.report.picture import Picture
from flows.report.reproduce import recipe_text, script
from flows.summary import RunSummary
from flows.table_formats import DataTable
from flows.wording import count, one_line, size, spell_out


@dataclass(frozen=True)
class Report:
    """Everything that there is to say about some runs."""

    page: Page

    @classmethod
    def of(cls, summaries: Sequence[RunSummary], title: str | None = None) -> Report:
        """The report of these runs, in this order. `title`: None for one made from the runs' names."""
        runs = report_runs(summaries)
        models = list(dict.fromkeys(run.model for run in runs))
        made = f"Made on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by blockpruner {blockpruner.__version__}."
        page = Page(
            title=one_line(title) if title else _title(runs, models),
            subtitle=_subtitle(runs, models),
            made=made,
            cards=_cards(runs[0]) if len(runs) == 1 else (),
            sections=tuple(section for section in _sections(runs) if section.pictures or section.table),
            details=tuple(map(_details, runs)),
            source=paper_figures().source,
        )
        return cls(page)

    @property
    def pictures(self) -> list[Picture]:
        """Every picture, in the order of the page."""
        return [picture for section in self.page.sections for picture in section.pictures]

    def write(self, output: Path) -> None:
        """Write the page, whole or not at all.

        Raises:
            OSError: naming the file, if it cannot be written.
        """
        temporary = output.with_name(f".{output.name[:40]}.{os.getpid()}.tmp")
        try:
            with naming(output), temporary.open("w", encoding="utf-8") as file:
                file.write(render(self.page))
            temporary.replace(output)
        finally:
            temporary.unlink(missing_ok=True)


def _title(runs: Sequence[ReportRun], models: Sequence[str]) -> str:
    if len(runs) == 1:
        return runs[0].label
    return f"{count(len(runs), 'run')} of {models[0] if len(models) == 1 else count(len(models), 'model')}"


def _subtitle(runs: Sequence[ReportRun], models: Sequence[str]) -> str:
    if len(runs) > 1:
        return ", ".join(models)
    record = runs[0].record
    removed = record.num_blocks_removed
    parts = [
        runs[0].model if runs[0].model != runs[0].label else "",
        count(record.num_layers, "layer") if record.num_layers else "",
        f"{record.num_parameters:,} parameters" if record.num_parameters else "",
        f"{removed} of {record.num_blocks_total} blocks removed" if removed else "",
        f"{record.created_at:%Y-%m-%d}",
    ]
    return ", ".join(part for part in parts if part)


def _sections(runs: Sequence[ReportRun]) -> Iterator[Section]:
    compared = comparisons(runs)
    if len(runs) > 1:
        yield Section("overview", "Overview", table=_overview(runs))
    perplexity = [search_curves(runs), *held_out_curves(runs, [comparison.paper for comparison in compared])]
    yield _section("perplexity", "Perplexity", perplexity)
    maps = [score_map(run, number) for number, run in enumerate(distinct_searches(runs), 1)]
    yield _section("blocks", "Blocks", [removal_map(runs), *maps], *([HOW_TO_READ] if any(maps) else []))
    yield _section("tasks", "Tasks", [task_bars(runs)])
    yield _section("speed", "Speed and memory", speed_bars(runs))
    yield _section("time", "Time", [stage_bars(runs)])
    for number, comparison in enumerate(compared, 1):
        yield Section(
            f"paper-{number}",
            f"{comparison.paper.name} in the paper and here",
            table=comparison.table,
            notes=(f"Published figures: {paper_figures().source}.", *comparison.differences),
        )


def _section(name: str, title: str, pictures: Sequence[Picture | None], *notes: str) -> Section:
    return Section(name, title, tuple(picture for picture in pictures if picture is not None), notes=notes)


def _overview(runs: Sequence[ReportRun]) -> DataTable:
    """A line for each dense model, then its runs; what is the same for all of them has no column."""
    several_models = len({run.model_key for run in runs}) > 1
    texts = list(dict.fromkeys(row.text for run in runs for row in run.summary.rows.perplexities))
    task_sets = [tasks for tasks in dict.fromkeys(map(_task_set, runs)) if tasks]
    columns = (
        "run",
        *(["model"] if several_models else []),
        *(["strategy"] if any((run.record.strategy or "") not in run.label for run in runs) else []),
        "blocks",
        "parameters removed",
        *(f"perplexity on {text}" for text in texts),
        *("accuracy" if len(task_sets) == 1 else f"accuracy, {', '.join(tasks)}" for tasks in task_sets),
        *(["status"] if any(run.record.status != "completed" for run in runs) else []),
    )
    rows = list[dict[str, object]]()
    for model in dict.fromkeys(run.model_key for run in runs):
        own = [run for run in runs if run.model_key == model]
        lines = [_dense_line(own, texts), *(_overview_line(run, texts, "pruned") for run in own)]
        rows += [line if len(task_sets) > 1 else _under_one_name(line) for line in lines if line]
    return DataTable(columns, tuple(tuple(row.get(column) for column in columns) for row in rows))


def _overview_line(run: ReportRun, texts: Sequence[str], variant: str) -> dict[str, object]:
    """What the table says of a run, by column."""
    record, found = run.record, run.accuracies(variant)
    measured = {f"perplexity on {text}": run.summary.perplexity(variant, text) for text in texts}
    accuracy = {f"accuracy, {', '.join(_task_set(run))}": found[-1].value} if found else {}
    about = {
        "run": run.label,
        "model": run.model,
        "strategy": record.strategy,
        "blocks": record.num_blocks_removed,
        "parameters removed": run.summary.ratio,
        "status": record.status,
    }
    return {**about, **measured, **accuracy}


def _dense_line(runs: Sequence[ReportRun], texts: Sequence[str]) -> dict[str, object]:
    """What the runs say of their dense model; nothing if none measured it."""
    found: dict[str, object] = {}
    for run in runs:
        for name, value in _overview_line(run, texts, "dense").items():
            if name.startswith(("perplexity on", "accuracy")) and value is not None:
                found.setdefault(name, value)
    if not found:
        return {}
    return {**found, "run": "dense", "model": runs[0].model, "blocks": 0, "parameters removed": 0.0}


def _under_one_name(line: dict[str, object]) -> dict[str, object]:
    return {"accuracy" if name.startswith("accuracy, ") else name: value for name, value in line.items()}


def _task_set(run: ReportRun) -> tuple[str, ...]:
    """The tasks that a run's mean accuracy is of."""
    found = run.accuracies("pruned") or run.accuracies("dense")
    return tuple(sorted(each.task for each in found if each.metric))  # an average has none


def _cards(run: ReportRun) -> tuple[Card, ...]:
    return tuple(card for card in (_size_card(run), *_loss_cards(run), *_gain_cards(run)) if card is not None)


def _size_card(run: ReportRun) -> Card | None:
    if run.summary.ratio is None:
        return None
    removed = run.summary.removed
    kinds = [f"{sum(step.block_kind == kind for step in removed)} {kind.upper()}" for kind in ("mha", "mlp")]
    return Card("Parameters removed", f"{run.summary.ratio:.1%}", f"{' and '.join(kinds)} blocks" if removed else "")


def _loss_cards(run: ReportRun) -> Iterator[Card]:
    texts = [row.text for row in run.summary.texts if row.text != CALIBRATION] or [CALIBRATION]
    dense, pruned = (run.summary.perplexity(variant, texts[0]) for variant in ("dense", "pruned"))
    if dense is not None and pruned is not None:
        yield Card("Perplexity", f"{dense:.4g} → {pruned:.4g}", f"on {texts[0]}")
    before, after = run.accuracies("dense"), run.accuracies("pruned")
    if before and after:
        note = "mean of the tasks" if len(after) > 1 else after[-1].task
        yield Card("Accuracy", f"{before[-1].value:.1%} → {after[-1].value:.1%}", note)


def _gain_cards(run: ReportRun) -> Iterator[Card]:
    dense, pruned = run.speeds("dense"), run.speeds("pruned")
    if (case := next(iter(dense.keys() & pruned.keys()), None)) is not None:
        case = min(dense.keys() & pruned.keys())
        times = pruned[case].decode_tokens_per_s / dense[case].decode_tokens_per_s
        yield Card("Decoding", f"{times:.2f} times", f"the dense model's speed, batch {case[0]}")
    if (export := run.summary.export) is not None:
        yield Card("Exported model", size(export.bytes), f"{export.format}, {export.num_parameters:,} parameters")


def _details(run: ReportRun) -> RunDetails:
    record, export = run.record, run.summary.export
    calibrated = [
        record.calibration,
        f"seed {record.seed}",
        f"{record.num_sequences} sequences of {record.sequence_length}",
    ]
    searched = [
        record.strategy,
        record.metric,
        f"blocks: {record.block_kinds}",
        *([run.settings] if run.settings else []),
    ]
    took = (record.finished_at - record.created_at).total_seconds() if record.finished_at else None
    facts = {
        "Run": record.run_id,
        "Status": record.status,
        "Begun": f"{record.created_at:%Y-%m-%d %H:%M:%S} UTC" + (f", took {spell_out(took)}" if took else ""),
        "Model": record.model,
        "Model's sha256": record.model_fingerprint,
        "Calibration": ", ".join(map(str, calibrated)) if record.num_sequences else record.calibration,
        "Search": ", ".join(filter(None, searched)) if record.strategy and not record.external else None,
        "Pruned elsewhere": f"{record.strategy}: {record.external}" if record.external else None,
        "Computed": f"in {record.dtype} on {record.device}, host {record.host}" if record.dtype else record.host,
        "Program": f"blockpruner {record.package_version}",
        "Exported model": f"{export.path} ({export.format})" if export else None,
        "Checked": _checked(run),
    }
    shown = tuple((name, one_line(value)) for name, value in facts.items() if value)
    error = one_line(f"{record.status}: {record.error}") if record.error else None
    return RunDetails(run.label, shown, recipe_text(record), script(run.summary.alone or record), error)


def _checked(run: ReportRun) -> str | None:
    if (export := run.summary.export) is None:
        return None
    if not export.verified:
        return "the exported model was not compared with the original"
    by = f" ({export.max_logit_difference:.1e} at most)" if export.max_logit_difference is not None else ""
    return f"the exported model's logits are the masked original's{by}"
