"""What a flow run leaves on Prefect's server to be looked at: tables, a summary, and pictures of the run.

A server that is gone, or takes no more, costs the run nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from flows.reporter import Reporter
from flows.results_table import results_table
from flows.server_contact import shown
from flows.summary import RunSummary
from flows.table_formats import DataTable, in_markdown, markdown_table
from flows.vector_pictures import blocks_svg, data_uri, perplexity_svg


def publish_run(summary: RunSummary, reporter: Reporter) -> None:
    """One run's tables and pictures."""
    about = f"Run {summary.record.run_id}"
    removed = DataTable(
        ("step", "layer", "block", "perplexity", "ratio"),
        tuple((s.step, s.layer_index, s.block_kind, s.perplexity, s.ratio) for s in summary.rows.search_steps),
    )
    pictures = {
        "removed-blocks": (blocks_svg(summary), "the blocks that went, with the step at which they did"),
        "perplexity": (perplexity_svg(summary), "what the removals cost"),
    }
    shown(
        reporter,
        "this run's tables",
        lambda: create_markdown_artifact(_summary_text(summary), key="prune-summary", description=about),
        table(removed, "pruning-order", f"{about}: what was removed"),
        table(results_table(summary), "measurements", f"{about}: dense and pruned"),
        *(_picture(svg, key, f"{about}: {words}") for key, (svg, words) in pictures.items() if svg is not None),
    )


def table(data: DataTable, key: str, description: str) -> Callable[[], object]:
    """What makes a table there. `key`: a-z, 0-9 and '-'."""
    return lambda: create_table_artifact(data.records, key=key, description=description)


def _picture(svg: str, key: str, description: str) -> Callable[[], object]:
    """What makes a picture there, which is in its own address."""
    return lambda: create_image_artifact(data_uri(svg), key=key, description=description)


def _summary_text(summary: RunSummary) -> str:
    report = f"blockpruner report {summary.record.run_id} --workspace {summary.workspace.path}"
    head = [f"# {in_markdown(summary.record.model)}", "", markdown_table(results_table(summary)), ""]
    paths = {"Exported model": str(summary.export_path), "All tables and pictures": report}
    return "\n".join([*head, *(f"{name}: {_code(text)}\n" for name, text in paths.items())])


def _code(text: str) -> str:
    """A path as it is; it may hold what Markdown would take for something."""
    return f"``{text}``" if "`" in text else f"`{text}`"
