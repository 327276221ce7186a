"""The report of a real tiny run: its numbers, its page in a headless Chromium, its pictures as files, its errors."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import plotly.graph_objects as go
import pytest
from playwright.sync_api import Browser

from flows.recipe import load_recipe, make_recipe
from flows.report.build import Report
from flows.report.pictures import write_pictures
from flows.report.reproduce import recipe_text, script
from flows.report.theme import DARK, LIGHT
from flows.summary import RunSummary
from stages.runs import RunRecord
from stages.store import ResultStore
from stages.workspace import Workspace
from tests.integration.command_line import blockpruner
from tests.integration.report_lab import ATTACK, METRICS, Theme, TinyFolder, a_browser, make_run, visiting

PICTURES = [
    *("perplexity-search", "perplexity-text-1", "removed-blocks", "block-scores-1", "task-accuracy"),
    *("speed-prefill", "speed-decode", "speed-memory", "speed-kv-cache", "stage-time"),
]
DRAWN = """name => {
    const place = document.getElementById(name);
    const marks = place.querySelectorAll(
        ".scatterlayer .point, .scatterlayer .js-line, .barlayer .point path, .heatmaplayer image");
    return Array.from(marks).filter(mark => {
        const box = mark.getBoundingClientRect();
        return box.width > 0 && box.height > 0;
    }).length;
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def record(tiny_folder: TinyFolder, folder: Path) -> RunRecord:
    return make_run(tiny_folder("llama"), folder)


@pytest.fixture(scope="module")
def workspace(record: RunRecord, folder: Path) -> Workspace:
    return Workspace(folder / "ws")


@pytest.fixture(scope="module")
def report(record: RunRecord, workspace: Workspace) -> Report:
    return Report.of([RunSummary.of(record, workspace, pytest.fail)])


@pytest.fixture(scope="module")
def page_file(record: RunRecord, folder: Path) -> Path:
    output = folder / "r.html"
    made = blockpruner("report", record.run_id, "--output", output, "--workspace", folder / "ws", "--json").json
    assert made == {"report": str(output), "figures": []}
    return output


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with a_browser() as opened:
        yield opened


def traces(report: Report, name: str) -> list[dict[str, Any]]:
    figure = next(picture for picture in report.pictures if picture.name == name).draw(LIGHT)
    return list(figure["data"])


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (375, 667)], ids=["desk", "phone"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_picture_is_drawn_and_nothing_is_fetched(
    browser: Browser, page_file: Path, theme: Theme, width: int, height: int
) -> None:
    colors = {"light": LIGHT, "dark": DARK}[theme]
    with visiting(browser, page_file, theme, width, height) as visit:
        assert visit.javascript("Array.from(document.querySelectorAll('.picture')).map(place => place.id)") == PICTURES
        empty = [name for name in PICTURES if not visit.page.evaluate(DRAWN, name)]
        assert empty == []
        assert visit.javascript("document.documentElement.dataset.drawn") == f"{theme} {len(PICTURES)}"
        assert visit.javascript("document.documentElement.scrollWidth") <= width
        ends = "svgs => svgs.map(svg => svg.getBoundingClientRect().right)"
        assert max(visit.page.locator(".picture .main-svg").evaluate_all(ends)) <= width
        behind = visit.javascript("document.querySelector('.picture .main-svg').style.background")
        assert [int(part) for part in behind[4:-1].split(",")] == list(bytes.fromhex(colors.surface[1:]))
        assert visit.said == []
        assert [address for address in visit.requests if not address.startswith("data:")] == []


def test_the_theme_follows_the_system_while_the_page_is_open(browser: Browser, page_file: Path) -> None:
    with visiting(browser, page_file, "light", 1280, 900) as visit:
        visit.page.emulate_media(color_scheme="dark")
        visit.page.wait_for_selector("html[data-drawn^='dark']", state="attached")
        visit.page.emulate_media(media="print")
        visit.page.wait_for_selector("html[data-drawn^='light']", state="attached")
        assert visit.said == []


def test_what_users_named_is_text_and_nothing_else(browser: Browser, page_file: Path) -> None:
    with visiting(browser, page_file, "light", 1280, 900) as visit:
        assert visit.page.locator("h1").inner_text() == ATTACK
        assert visit.javascript("document.images.length + document.querySelectorAll('b, i, main a').length") == 0
        assert visit.javascript("document.scripts.length") == 3
        assert "a <i>machine</i>" in visit.page.locator("#speed-prefill").locator("xpath=..").inner_text()
        assert ATTACK in visit.page.locator("pre").first.inner_text().replace("''", "'")
        assert visit.said == []


def test_a_script_that_got_in_would_not_run_nor_fetch(browser: Browser, page_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    intruder = "<script>document.title = 'taken'</script><img src='http://127.0.0.1:9/x' onerror='document.title=1'>"
    broken.write_text(page_file.read_text().replace("<footer>", f"<footer>{intruder}"))
    with visiting(browser, broken, "light", 1280, 900) as visit:
        assert visit.page.title() == ATTACK
        assert sum("Content Security Policy" in line for line in visit.said) >= 2  # the page's own rules refused both


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_pictures_show_what_the_database_has(report: Report, record: RunRecord, workspace: Workspace) -> None:
    store = ResultStore(workspace.database, pytest.fail)
    store.ingest(record)
    steps = store.query("SELECT ratio, perplexity FROM search_steps ORDER BY step").rows
    on_calibration = "SELECT perplexity FROM perplexities WHERE text = 'calibration' AND variant = 'dense'"
    ((dense,),) = store.query(on_calibration).rows
    (curve,) = traces(report, "perplexity-search")
    assert list(zip(curve["x"], curve["y"], strict=True)) == [(0.0, dense), *steps]

    heat = [trace for trace in traces(report, "block-scores-1") if trace["type"] == "heatmap"]
    for kind, trace in zip(("mha", "mlp"), heat, strict=True):
        scores = store.query(f"SELECT step, layer_index, score FROM block_scores WHERE block_kind = '{kind}'").rows
        found = {
            (step, layer): trace["z"][step - 1][layer]
            for step in trace["y"]
            for layer in trace["x"]
            if trace["z"][step - 1][layer] is not None
        }
        lowest = dict(store.query("SELECT step, min(score) FROM block_scores GROUP BY step").rows)
        assert found.keys() == {(step, layer) for step, layer, _ in scores}
        for step, layer, score in scores:
            assert found[step, layer] == pytest.approx(math.log10(score / lowest[step]), abs=1e-9)


def test_rings_and_numbers_say_which_block_went_when(report: Report, record: RunRecord, workspace: Workspace) -> None:
    order = [(s.block_kind, s.layer_index) for s in RunSummary.of(record, workspace, pytest.fail).rows.search_steps]
    rings = [trace for trace in traces(report, "block-scores-1") if trace["type"] == "scatter"]
    circled = {
        (kind, layer): step
        for kind, trace in zip(("mha", "mlp"), rings, strict=True)
        for layer, step in zip(trace["x"], trace["y"], strict=True)
    }
    when = traces(report, "removed-blocks")[1]["z"]
    numbered = {
        (kind, layer): step
        for kind, row in zip(("mha", "mlp"), when, strict=True)
        for layer, step in enumerate(row)
        if step is not None
    }
    assert circled == numbered == {block: step for step, block in enumerate(order, 1)}


def test_tasks_show_acc_norm_with_its_error_and_the_average(report: Report) -> None:
    dense, pruned = traces(report, "task-accuracy")
    assert dense["y"] == pruned["y"] == [*METRICS, "average"]
    assert dense["x"] == pytest.approx([0.75, 0.61, 0.68])
    assert pruned["x"] == pytest.approx([0.70, 0.52, 0.61])
    assert dense["error_x"]["array"] == pytest.approx([0.01, 0.01, math.sqrt(2 * 0.01**2) / 2])


def test_every_figure_is_one_that_plotly_knows(report: Report) -> None:
    for picture in report.pictures:
        for theme in (LIGHT, DARK):
            go.Figure(picture.draw(theme))  # raises for a name or a value that plotly does not have


# --- to do it again ---------------------------------------------------------------------------------------------------


def test_the_recipe_is_the_runs(record: RunRecord, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe_text(record))
    assert load_recipe(str(tmp_path / "recipe.yaml"), {}) == make_recipe(record.config)


def test_the_script_does_the_run_again(record: RunRecord, workspace: Workspace, tmp_path: Path) -> None:
    searched = record.model_copy(update={"stages": [s for s in record.stages if s.role in ("calibration", "search")]})
    text = script(searched)
    assert text.endswith("\nblockpruner search recipe.yaml\n")
    writing = text.removesuffix("blockpruner search recipe.yaml\n")
    subprocess.run(["bash", "-eu", "-c", writing], cwd=tmp_path, check=True)
    again = blockpruner("search", tmp_path / "recipe.yaml", "--workspace", workspace.path, "--json").json
    assert all(stage["cached"] for stage in again["stages"])
    assert again["name"] == ATTACK


# --- files and refusals -----------------------------------------------------------------------------------------------


def test_pictures_as_png_and_svg(browser: Browser, report: Report, tmp_path: Path) -> None:
    chosen = [picture for picture in report.pictures if picture.name in ("removed-blocks", "task-accuracy")]
    written = write_pictures(chosen, tmp_path / "new" / "figures")
    assert sorted(path.name for path in written) == [
        *("removed-blocks.png", "removed-blocks.svg", "task-accuracy.png", "task-accuracy.svg")
    ]
    for path in written:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
        else:
            assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--output", "notes.txt"], "--output is notes.txt, which does not end in .html"),
        (["--output", "no/such/r.html"], "no/such is not there"),
        (["--figures", "pyproject.toml"], "pyproject.toml is a file; give --figures a folder"),
        (["--figures", "here"], "no Chromium or Chrome was found"),
    ],
)
def test_what_cannot_be_written_is_refused_at_once(
    options: list[str], words: str, monkeypatch: pytest.MonkeyPatch, workspace: Workspace
) -> None:
    monkeypatch.setattr("choreographer.browsers.chromium.Chromium.find_browser", lambda **_: None)
    outcome = blockpruner("report", "latest", *options, "--workspace", workspace.path)
    assert (outcome.status, outcome.stdout) == (2, "")
    assert words in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_show_in_every_form(record: RunRecord, workspace: Workspace) -> None:
    shown = {
        form: blockpruner("show", record.run_id, f"--{form}", "--workspace", workspace.path).stdout
        for form in ("json", "csv", "markdown", "latex")
    }
    assert json.loads(shown["json"])["run_id"] == record.run_id
    assert "\npiqa" not in shown["csv"]
    assert '\n"piqa, acc_norm",0.75,0.7,0.01,0.01\n' in shown["csv"]
    assert "| piqa, acc_norm | 0.75 | 0.7 | 0.01 | 0.01 |" in shown["markdown"]
    assert r"piqa, acc\_norm & 0.75 & 0.7 & 0.01 & 0.01 \\" in shown["latex"]
    assert blockpruner("show", record.run_id, "--csv", "--latex", "--workspace", workspace.path).status == 2
