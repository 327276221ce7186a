"""A workspace with a real run of a tiny model, whose name is an attack, and a browser that counts what it is asked."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from stages.runs import RunRecord
from tests.integration.command_line import blockpruner
from tests.tiny_models import tiny_rows
from tests.unit.store_lab import Lab

ATTACK = "</script><img src=x onerror=alert(1)><b>&amp; %{y} $x^2$ {{ 7 * 7 }}"
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
Theme = Literal["light", "dark"]
TinyFolder = Callable[[str], Path]

METRICS = {"piqa": (0.75, 0.70), "arc_easy": (0.61, 0.52)}
"""By task: dense, pruned; acc_norm, with a standard error of 0.01; acc is 0.02 less."""


def make_run(model: Path, folder: Path, name: str = ATTACK) -> RunRecord:
    """Prune a tiny model for real; tasks and speed, which take long, are written by hand into the same run."""
    (folder / "cal.txt").write_text("\n".join(tiny_rows(60)))
    (folder / "eval.txt").write_text("\n".join(tiny_rows(30, seed=1)))
    options = ["--model", model, "--calibration", folder / "cal.txt", "--eval-text", folder / "eval.txt"]
    sizes = ["--num-samples", 40, "--sequence-length", 16, "--num-blocks", 3, "--name", name]
    result = blockpruner("evaluate", *options, *sizes, "--workspace", folder / "ws", "--json").json
    lab = Lab(folder / "ws")
    record = lab.runs.load(result["run_id"])
    texts = [
        {"text": row["text"], "num_tokens": 100, "perplexity": row["perplexity"]}
        for row in result["perplexities"]
        if row["variant"] == "pruned"
    ]
    speeds = [*_speeds("dense", 1), *_speeds("pruned", 2)]
    record.stages += [
        lab.artifact("evaluate:dense", {"texts": [], "metrics": _metrics(0)}, "report"),
        lab.artifact("evaluate:pruned", {"texts": texts, "metrics": _metrics(1)}, "report"),
        lab.artifact("speed", {"machine": "a <i>machine</i>", "speeds": speeds}, "report"),
    ]
    lab.runs.save(record)
    return record


def _metrics(variant: int) -> list[dict[str, Any]]:
    return [
        {"task": task, "metric": metric, "value": values[variant] - less, "stderr": 0.01, "num_examples": 100}
        for task, values in METRICS.items()
        for metric, less in (("acc", 0.02), ("acc_norm", 0.0))
    ]


def _speeds(variant: str, factor: int) -> list[dict[str, Any]]:
    return [
        {"variant": variant, "batch_size": batch, "prompt_tokens": 128, "new_tokens": 32, "prefill_ms": 40.0 / factor,
         "decode_tokens_per_s": 100.0 * factor, "peak_memory_bytes": 10**9 // factor, "kv_cache_bytes_per_token": 64.0}
        for batch in (1, 8)
    ]  # fmt: skip


@dataclass
class Visit:
    """One page, and what happened while it was open."""

    page: Page
    requests: list[str] = field(default_factory=list)
    """Everything asked for beside the page itself."""
    said: list[str] = field(default_factory=list)
    """Messages of the console, errors, dialogs."""

    def javascript(self, expression: str) -> Any:
        """The value of an expression in the page."""
        return self.page.evaluate(expression)


@contextmanager
def visiting(browser: Browser, page_file: Path, theme: Theme, width: int, height: int) -> Iterator[Visit]:
    """Open a page from its file, with a network that answers nothing, and wait until its pictures are drawn."""
    with browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme, offline=True) as context:
        page = context.new_page()
        visit = Visit(page)
        address = page_file.resolve().as_uri()
        page.on("request", lambda request: None if request.url == address else visit.requests.append(request.url))
        page.on("console", lambda message: visit.said.append(message.text))
        page.on("pageerror", lambda error: visit.said.append(str(error)))

        def dismiss(dialog: Any) -> None:
            visit.said.append(f"dialog: {dialog.message}")
            dialog.dismiss()

        page.on("dialog", dismiss)
        page.goto(address)
        page.wait_for_selector("html[data-drawn]", state="attached", timeout=30_000)
        yield visit


@contextmanager
def a_browser() -> Iterator[Browser]:
    """A headless Chromium: the system's, or the one that `playwright install chromium` fetched."""
    installed = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    with sync_playwright() as playwright:
        path = installed or playwright.chromium.executable_path
        if not Path(path).is_file():
            pytest.skip("needs a Chromium: apt-get install chromium, or playwright install chromium")
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
