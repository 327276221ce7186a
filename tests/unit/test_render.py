"""What people see: the strip of blocks, durations, the estimate of what is left, tables with awkward values."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from blockpruner.progress import Progress, Throughput
from flows.cell_worker import Event
from flows.compare_progress import CompareProgress
from flows.demo import unigram_perplexity
from flows.eta import RemainingTime
from flows.render import Answer, number, on_stdout, order_line, query_table, run_view, runs_table, strip, task_table
from flows.reporter import Reporter, describe
from flows.summary import RunSummary, dump_json
from flows.terminal import Terminal
from flows.wording import count, one_line, size, spell_out
from stages.runs import RunRecord, StageRun
from stages.store_rows import RunRows
from stages.store_schema import EvaluationRow, ExportRow, PerplexityRow, RunRow, StepRow
from stages.workspace import Workspace


def text_of(view: RenderableType, width: int = 120) -> str:
    console = Terminal(io.StringIO(), width=width)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def step(number: int, kind: str, layer: int, perplexity: float = 2.0) -> StepRow:
    return StepRow("r", number, layer, kind, perplexity, perplexity, 100 * number, 0.1 * number, 1.5)


def record(**fields: object) -> RunRecord:
    base = {
        "run_id": "20260101-000000-abcdef",
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        "finished_at": datetime(2026, 1, 1, 0, 2, tzinfo=UTC),
        "status": "completed",
        "pid": 1,
        "host": "h",
        "model": "m[bold]x",
        "num_layers": 3,
        "num_blocks_total": 6,
        "num_parameters": 1000,
        "num_blocks_removed": 1,
        "stages": [StageRun(stage="search", label="search", role="search", status="completed", cached=True)],
    }
    return RunRecord.model_validate({**base, **fields})


def summary(run: RunRecord) -> RunSummary:
    rows = RunRows(
        runs=list[RunRow](),
        stage_runs=[],
        search_steps=[step(1, "mha", 1), step(2, "mlp", 2, float("inf"))],
        block_scores=[],
        perplexities=[
            PerplexityRow("r", "dense", "calibration", 0, 100, 2.0),
            PerplexityRow("r", "pruned", "calibration", 1, 100, 3.0),
            PerplexityRow("r", "dense", "only.txt", 0, 7, float("nan")),
        ],
        evaluations=[
            EvaluationRow("r", "dense", "t", "acc", 0.5, 0.01, 0, 10),
            EvaluationRow("r", "pruned", "t", "acc", 0.25, None, 0, 10),
        ],
        exports=[ExportRow("r", "stock", "/x/model", 1, 900, 1234567, True, 1e-6)],
        speed=[],
    )
    return RunSummary(run, rows, Workspace(Path("/nowhere")))


def test_several_tasks_have_an_average() -> None:
    average = EvaluationRow("r", "dense", "average", "acc_norm or acc", 0.5, 0.01, 0, 10)
    one = [EvaluationRow("r", "dense", "t", metric, 0.5, 0.01, 0, 10) for metric in ("acc", "acc_norm")]
    assert "average" not in text_of(task_table([*one, average])), "of one task it says nothing"
    two = [*one, EvaluationRow("r", "dense", "u", "acc", 0.5, 0.01, 0, 10)]
    assert "average  acc_norm or acc  0.5 ± 0.010" in text_of(task_table([*two, average]))


def test_the_strip_shows_what_is_gone() -> None:
    assert text_of(strip(7, [step(1, "mha", 1), step(2, "mlp", 6)])).splitlines() == [
        "layer 0    5",
        "mha   ■·■■■■■",
        "mlp   ■■■■■■·",
    ]
    assert order_line([step(1, "mha", 1), step(2, "mlp", 6)]) == "mha:1 mlp:6"


def test_a_run_shows_removed_searched_measured_and_cached() -> None:
    shown = text_of(run_view(summary(record())))
    assert "m[bold]x" in shown  # what a user named is no markup
    assert "mha   ■·■" in shown
    assert "mlp:2 (searched, kept)" in shown
    assert "1.50" in shown  # pruned over dense
    assert "0.5 ± 0.010" in shown
    assert "/x/model" in shown
    assert "1.2 MB" in shown
    assert "cached" in shown


def test_a_run_that_failed_shows_its_error() -> None:
    failed = record(status="failed", error="no such thing", stages=[], num_layers=None)
    assert "failed: no such thing" in text_of(run_view(summary(failed)))
    assert "no such thing" in text_of(runs_table([failed]), width=200)


def test_json_has_the_contract_and_no_nan() -> None:
    values = json.loads(dump_json(summary(record()).as_json()))
    assert values["run_id"] == "20260101-000000-abcdef"
    assert {"step", "layer_index", "block_kind", "perplexity", "ratio"} <= values["pruning_order"][0].keys()
    assert values["pruning_order"][1]["perplexity"] is None  # JSON has no infinity
    assert (values["dense_perplexity"], values["pruned_perplexity"]) == (2.0, 3.0)
    assert values["export_path"] == "/x/model"


def test_values_of_a_query_are_shown_as_they_are() -> None:
    shown = text_of(query_table(["a", "[red]b"], [[None, "[bold]x"], [1.5, "y"]]))
    assert "[red]b" in shown
    assert "[bold]x" in shown


def test_numbers_stand_to_the_right() -> None:
    lines = text_of(query_table(["n", "text"], [[1, "a"], [12345, "b"], [None, "c"]])).splitlines()
    assert [line.rstrip() for line in lines] == ["    n  text", "    1  a", "12345  b", "       c"]


def test_a_pipe_has_no_width(capsys: pytest.CaptureFixture[str]) -> None:
    on_stdout().print(Answer(["a", "b"], [["x " * 2000, "y" * 4000]]))
    assert capsys.readouterr().out.splitlines()[1].split() == ["x"] * 2000 + ["y" * 4000]


def on_terminal(answer: Answer, width: int) -> list[str]:
    console = Terminal(io.StringIO(), force_terminal=True, color_system=None, width=width)
    console.print(answer)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue()).splitlines()]


def test_on_a_terminal_only_the_long_cells_of_an_answer_are_cut() -> None:
    config = json.dumps({f"setting{number}": number for number in range(100)})
    lines = on_terminal(Answer(["run_id", "config", "n"], [["20261128-072815-a43d7c", config, 1]] * 2), 60)
    assert lines[0].split() == ["run_id", "config", "n"]
    assert lines[1] == lines[2] == f"20261128-072815-a43d7c  {config[: 60 - 28]}…  1"


@pytest.mark.parametrize("width", [60, 72, 73, 80, 120, 200])
def test_what_has_no_room_on_a_terminal_is_left_out_in_the_middle(width: int) -> None:
    names = [f"column{number}" for number in range(31)]
    lines = on_terminal(Answer(names, [[f"a long value of {name}" for name in names], ["好" * 40] * 31]), width)
    assert len(lines) == 4
    assert max(map(cell_len, lines)) <= width
    before, after = (part.split() for part in lines[0].split("…"))
    assert [*before, *after] == [*names[: len(before)], *names[31 - len(after) :]]
    assert abs(len(before) - len(after)) <= 1
    cut = [f"a long value of {name}"[:21] + "…" for name in (*before, *after)]
    assert lines[1] == "  ".join([*cut[: len(before)], "…", *cut[len(before) :]])
    assert cell_len(lines[2]) + 26 > width, "there was room for one more"
    assert lines[3] == f"31 columns, {len(before) + len(after)} shown; --csv and --json give them all"


def test_on_a_very_narrow_terminal_the_first_column_is_left() -> None:
    lines = on_terminal(Answer(["run_id", "b"], [["20261128-072815-a43d7c", "x" * 40]]), 30)
    assert lines[:2] == [f"{'run_id':<22}  …", "20261128-072815-a43d7c  …"]


def test_nothing_is_cut_where_there_is_no_terminal() -> None:
    shown = text_of(Answer(["a", "b"], [["x" * 100, "y" * 100]]), width=60)
    assert "…" not in shown
    assert (shown.count("x"), shown.count("y")) == (100, 100)


def test_an_answer_that_fits_a_terminal_is_whole() -> None:
    answer = Answer(["a", "b"], [["x" * 40, "y" * 18], [None, 0.5]])
    assert on_terminal(answer, 60)[1] == f"{'x' * 40}  {'y' * 18}"
    assert "…" in on_terminal(answer, 59)[1]


def test_what_a_user_named_steers_no_terminal() -> None:
    named = record(name="a\x1b[2J\nb\u202e", model="m\x07", error="e\x9b", status="failed")
    for view in (runs_table([named]), run_view(summary(named)), query_table(["c\x1b"], [["v\x1b"], ["two\nlines"]])):
        shown = text_of(view, width=200)
        assert not set(shown) & set("\x1b\x07\x9b\u202e")
        assert "\\x1b" in shown
    assert "a\\x1b[2J b\\u202e" in text_of(runs_table([named]), width=200)
    assert (
        one_line("family: \U0001f468\u200d\U0001f469, caf\xe9, a\xa0b")
        == "family: \U0001f468\u200d\U0001f469, caf\xe9, a b"
    )
    console = Terminal(io.StringIO(), width=120)
    Reporter(console).warn("no file \x1b]0;x\udcff")
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "Warning: no file \\x1b]0;x\\udcff\n"


@pytest.mark.parametrize(
    ("tokens", "flops_per_s", "words"),
    [
        (640, 3.67e9, "640 tokens at 3.67 GFLOP/s"),
        (5_120, 8.1e8, "5.12 k tokens at 810 MFLOP/s"),
        (12_500_000, 3.12e14, "12.5 M tokens at 312 TFLOP/s"),
        (999_700, 2.5e15, "1000 k tokens at 2500 TFLOP/s"),
    ],
)
def test_speeds_are_in_units_that_fit(tokens: int, flops_per_s: float, words: str) -> None:
    progress = Progress(1, 4, "candidates", throughput=Throughput(tokens, flops_per_s, None))
    assert describe(progress, None) == f"candidates, {words}"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (9.4, "9.4 s"), (59, "59 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert spell_out(seconds) == words


def test_numbers() -> None:
    assert [number(value) for value in (None, 2.34567, 1234567.8, float("inf"))] == ["", "2.346", "1,234,568", "inf"]
    assert [size(value) for value in (0, 999, 1000, 4_200_000)] == ["0 bytes", "999 bytes", "1.0 kB", "4.2 MB"]
    assert [count(1, "block"), count(1234, "block")] == ["1 block", "1,234 blocks"]


def test_the_estimate_counts_only_what_was_computed_now() -> None:
    clock = iter([100.0, 110.0, 120.0])
    remaining = RemainingTime(lambda: next(clock))
    assert remaining.seconds(Progress(900, 1000, "candidates", resumed=900)) is None
    assert remaining.seconds(Progress(910, 1000, "candidates", resumed=900)) == pytest.approx(90.0)
    # What turns out to have been there already is no work of ours.
    assert remaining.seconds(Progress(970, 1000, "candidates", resumed=950)) == pytest.approx(30.0)


def test_no_estimate_without_a_total() -> None:
    remaining = RemainingTime(iter([0.0, 1.0]).__next__)
    assert remaining.seconds(Progress(0, None, "rows")) is None
    assert remaining.seconds(Progress(5, None, "rows")) is None
    assert describe(Progress(5, None, "rows", "reading"), None) == "rows, reading"


def test_a_log_hears_of_progress_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.reporter._LINE_EVERY_S", 0.0)
    console = Terminal(io.StringIO(), width=120)
    with Reporter(console).working("search") as report:
        report(Progress(1, 4, "candidates", "step 1"))
        report(Progress(4, 4, "candidates", "step 1"))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "search: 1 of 4 candidates, step 1\n"


def test_a_terminal_gets_a_bar() -> None:
    console = Terminal(io.StringIO(), width=120, force_terminal=True)
    with Reporter(console).working("search") as report:
        report(Progress(1, 4, "candidates", "step 1"))
    assert isinstance(console.file, io.StringIO)
    assert "candidates, step 1" in console.file.getvalue()


STEERING = "n\x1b]0;PWN\x9b\x1b[2J\u202e[/red]"
SHOWN = "n\\x1b]0;PWN\\x9b\\x1b[2J\\u202e[/red]"


def test_nothing_that_is_named_steers_a_terminal_with_bars() -> None:
    console = Terminal(io.StringIO(), width=200, force_terminal=True)
    reporter = Reporter(console)
    with reporter.working(STEERING) as report:
        report(Progress(1, 4, "candidates", STEERING))
    with reporter.waiting(STEERING):
        pass
    with CompareProgress(reporter, 1) as progress:
        listener = progress.begin(STEERING)
        listener(Event(kind="progress", text=STEERING))
        progress.end(STEERING, listener, Event(kind="end", text=STEERING), 1.0)
    assert isinstance(console.file, io.StringIO)
    drawn = console.file.getvalue()
    assert drawn.count(SHOWN) >= 6
    assert not any(part in drawn for part in ("\x1b]0;", "\x9b", "\x1b[2J\\", "\x1b[2J[", "\u202e"))


@pytest.mark.parametrize("wrap", [str, Text, lambda text: _in_a_table(text), lambda text: Group(text, Text(text))])
def test_a_terminal_takes_nothing_for_markup_or_orders(wrap: Callable[[str], RenderableType]) -> None:
    """Also what somebody forgot to make fit to be shown."""
    console = Terminal(io.StringIO(), width=200)
    console.print(wrap(f"{STEERING} :smile: [bold]b"))
    assert isinstance(console.file, io.StringIO)
    for line in console.file.getvalue().splitlines():
        assert line.rstrip() == f"{SHOWN} :smile: [bold]b"


def _in_a_table(text: str) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row(text)
    return table


@pytest.mark.parametrize("text", [STEERING, "\x9b31m\x7f", "\U000e0001\udcff", "plain \u200d caf\xe9"])
def test_json_is_fit_to_be_shown_and_the_same_json(text: str) -> None:
    shown = dump_json({text: [text]})
    assert one_line(shown) == shown
    assert json.loads(shown) == {text: [text]}


def test_unigram_perplexity_of_equal_frequencies_is_their_number() -> None:
    assert unigram_perplexity([[9, 1, 2], [9, 3, 4]]) == pytest.approx(4.0)  # the first of each is not predicted
