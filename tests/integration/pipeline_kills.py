"""The whole pipeline, killed (SIGKILL, nothing is tidied up) at random moments; and nothing is lost.

    python -m tests.integration.pipeline_kills --kills 100 --seed 1

calls `blockpruner run` on a tiny model, in fresh processes, with a Prefect server beside them; with `--tasks` some
questions of the demo's are asked as well, with `--speed` `blockpruner speed latest` follows. Half of the moments are
shares of the time that an undisturbed call takes, from its first import to its end; the others are shares of all the
changes that it makes to files of the workspace, for these are a small part of its time and what can be torn. After
every kill each artifact that is there must be whole and the same as an undisturbed run's; the next call that is not
killed must finish, with the same trace and no folder left over. Says where the kills fell.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stages.runs import RunStore
from stages.store import ResultStore
from tests.integration.command_line import ROOT, Outcome
from tests.integration.prefect_lab import PrefectLab
from tests.tiny_models import save_tiny_model, tiny_rows

_TIMINGS = frozenset(
    {
        *("seconds", "work_saved", "created_at", "sha256", "bytes", "max_logit_difference"),
        *("prefill_ms", "decode_tokens_per_s", "peak_memory_bytes"),
    }
)
"""What two runs may say differently in JSON. (The bytes of files are compared themselves.)"""
_ANSWERS = frozenset({"results", "versions", "n-shot", "n-samples"})
"""What they must say alike in what lm-eval writes, beside dates, paths and how it finds the machine."""
SPEED = {"batch_sizes": 1, "prompt_tokens": 4, "new_tokens": 1, "repeats": 1}
"""Options of `blockpruner speed`."""
_MOST_KILLS_IN_A_ROW = 3


class Call(Protocol):
    """A call of the pipeline in a process of its own."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""

    def outcome(self, timeout: float = 120.0) -> Outcome:
        """Wait for its end."""

    def end(self) -> None:
        """Kill it, if it still runs."""


Launch = Callable[[Path, Path, int], Call]
"""`(workspace, folder for what it says, the change of files before which it dies, or 0)`."""


class Reference:
    """An undisturbed run: what must come out, how long it takes, and how many changes of files it makes."""

    def __init__(self, launch: Launch, folder: Path) -> None:
        """Call it once."""
        self.workspace = folder / "undisturbed"
        begun = time.monotonic()
        outcome = launch(self.workspace, folder / "said-undisturbed", 0).outcome()
        self.seconds = time.monotonic() - begun
        assert outcome.status == 0, outcome
        self.num_changes = int((folder / "said-undisturbed" / "changes").read_text())
        self.artifacts = {path.relative_to(self.workspace) for path in self.workspace.glob("artifacts/*/*")}
        check_whole(self.workspace, self)

    def same(self, file: Path, workspace: Path) -> bool:
        """Whether a file of another workspace holds what this one's does."""
        return content_of(file) == content_of(self.workspace / file.relative_to(workspace))


def content_of(file: Path) -> Any:
    """A file's content without timings."""
    if file.suffix not in (".json", ".jsonl"):
        return hashlib.sha256(file.read_bytes()).hexdigest()
    lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    if file.name == "lm_eval.json":
        return {key: value for key, value in json.loads(lines[0]).items() if key in _ANSWERS}
    return [_without_timings(json.loads(line)) for line in lines]


def _without_timings(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_timings(item) for key, item in value.items() if key not in _TIMINGS}
    return [_without_timings(item) for item in value] if isinstance(value, list) else value


def check_whole(workspace: Path, reference: Reference) -> None:
    """Every artifact that is in its place has the files that its manifest names, and those of an undisturbed run."""
    for folder in workspace.glob("artifacts/*/[!.]*"):
        manifest = json.loads((folder / "manifest.json").read_text())
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        assert files.keys() == {*manifest["files"], "manifest.json"}, folder
        for name, expected in manifest["files"].items():
            assert hashlib.sha256(files[name].read_bytes()).hexdigest() == expected["sha256"], files[name]
        for path in files.values():
            assert reference.same(path, workspace), path


def check_finished(workspace: Path, outcome: Outcome, reference: Reference) -> None:
    """A call that was not killed has finished, with all that an undisturbed one has, and left nothing over."""
    assert outcome.status == 0, outcome
    assert not any(word in outcome.stderr for word in ("Traceback", "damaged", "computed again")), outcome.stderr
    assert {path.relative_to(workspace) for path in workspace.glob("artifacts/*/*")} == reference.artifacts
    left_over = [
        path for path in workspace.rglob("*") if ".tmp" in path.name or path.name.startswith("results.duckdb.")
    ]
    assert left_over == []
    assert not (workspace / "damaged").exists()
    said: list[str] = []
    latest, *before = RunStore(workspace, said.append).list()
    assert latest.status == "completed"
    assert {record.status for record in before} <= {"crashed", "completed"}
    results = ResultStore(workspace / "results.duckdb", said.append)
    stored = dict(results.query("SELECT run_id, status FROM runs").rows)
    assert stored == {record.run_id: record.status for record in (latest, *before)}
    steps = results.query(f"SELECT count(*) FROM search_steps WHERE run_id = '{latest.run_id}'").rows
    assert steps == [(latest.config["num_blocks"],)]
    assert said == []


def where_it_fell(workspace: Path, before: int) -> str:
    """What the newest run was at when it was killed. `before`: how many runs there were before it."""
    records = RunStore(workspace).list()
    if len(records) == before:
        return "before the run began"
    (latest, *_) = records
    if latest.status != "running":
        return "at its end"
    running = [stage for stage in latest.stages if stage.status == "running"]
    if not running:
        return "between stages"
    begun = any(workspace.glob(f"artifacts/{running[0].stage}/.tmp-{running[0].fingerprint}-*"))
    return f"in {running[0].label}" + ("" if begun else ", before its folder")


@dataclass(frozen=True)
class Moment:
    """When to kill."""

    seconds: float
    change: int
    """0: at a time."""

    @classmethod
    def drawn(cls, draw: random.Random, reference: Reference) -> Moment:
        """One of an undisturbed call's."""
        share = draw.random()
        if draw.random() < 0.5:
            return cls(share * reference.seconds, 0)
        return cls(float("inf"), 1 + int(share * reference.num_changes))


def is_killed(call: Call, moment: Moment) -> bool:
    """Wait for the moment and kill the call then; False if it had ended before."""
    deadline = time.monotonic() + moment.seconds
    while not call.is_over and time.monotonic() < deadline:
        time.sleep(0.002)
    call.end()
    return call.outcome().status == -9


def campaign(
    launch: Launch, folder: Path, num_kills: int, seed: int, most_seconds: float = float("inf")
) -> Counter[str]:
    """Kill so many calls, let the others finish, check after each, and count where the kills fell."""
    until = time.monotonic() + most_seconds
    reference = Reference(launch, folder)
    draw, fell, number = random.Random(seed), Counter[str](), 0
    while fell.total() < num_kills and time.monotonic() < until:
        workspace = folder / f"workspace-{number}"
        for _ in range(draw.randint(1, min(_MOST_KILLS_IN_A_ROW, num_kills - fell.total()))):
            before, number = len(RunStore(workspace).list()), number + 1
            moment = Moment.drawn(draw, reference)
            call = launch(workspace, folder / f"said-{number}", moment.change)
            if is_killed(call, moment):
                fell[where_it_fell(workspace, before)] += 1
                check_whole(workspace, reference)
            else:
                check_finished(workspace, call.outcome(), reference)
        number += 1
        check_finished(workspace, launch(workspace, folder / f"said-{number}", 0).outcome(), reference)
        check_whole(workspace, reference)
    return fell


def prepare(folder: Path) -> dict[str, Any]:
    """Write a model and texts, and return a recipe's fields: all stages, and a few steps of the search."""
    save_tiny_model(folder / "model")
    (folder / "cal.txt").write_text("\n".join(tiny_rows(40)))
    (folder / "eval.txt").write_text("\n".join(tiny_rows(30, seed=1)))
    texts = {"calibration": str(folder / "cal.txt"), "eval_text": str(folder / "eval.txt")}
    return {"model": str(folder / "model"), "num_samples": 30, "sequence_length": 16, "num_blocks": 3, **texts}


def with_tasks() -> dict[str, Any]:
    """More of a recipe's fields: a few of the demo's questions."""
    return {"tasks": "demo_facts", "task_dir": str(ROOT / "data" / "demo" / "tasks"), "limit": 4}


_COMMANDS = """
import json, sys
from tests.integration.file_changes import die_before_change
change, workspace, notes, *commands = sys.argv[1:]
die_before_change(int(change), workspace, notes)
from flows.cli import app
for command in commands:
    try:
        app([*json.loads(command), "--workspace", workspace], prog_name="blockpruner")
    except SystemExit as end:
        if end.code:
            raise
"""
"""Commands, as JSON, one after another until one fails. Nothing is imported before that need not be."""


class _FreshCall:
    """Commands in a fresh process."""

    def __init__(self, commands: Sequence[list[str]], workspace: Path, said: Path, change: int) -> None:
        said.mkdir()
        arguments = [str(change), str(workspace), str(said / "changes"), *map(json.dumps, commands)]
        with (said / "stderr").open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMANDS, *arguments],
                env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(_folder_for_the_system(workspace))},
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        self._said = said

    @property
    def is_over(self) -> bool:
        return self._process.poll() is not None

    def outcome(self, timeout: float = 600.0) -> Outcome:
        return Outcome(self._process.wait(timeout), "", (self._said / "stderr").read_text())

    def end(self) -> None:
        self._process.kill()


def _options(fields: Mapping[str, Any]) -> list[str]:
    return [part for name, value in fields.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def _folder_for_the_system(workspace: Path) -> Path:
    """Where temporary files go that are none of the workspace's."""
    folder = workspace.parent / "tmp"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def prefect_server(folder: Path) -> Iterator[None]:
    """A server for all calls, unless PREFECT_API_URL names one."""
    if "PREFECT_API_URL" in os.environ:
        yield
        return
    lab = PrefectLab(folder / "server")
    try:
        lab.start_server()
        os.environ.update({name: lab.environment[name] for name in ("PREFECT_HOME", "PREFECT_API_URL")})
        yield
    finally:
        lab.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Kill as often as asked for, and say where the kills fell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no more kills after that")
    parser.add_argument("--tasks", action="store_true", help="evaluate with lm-eval as well")
    parser.add_argument("--speed", action="store_true", help="time the model as well, in a command of its own")
    asked = parser.parse_args(arguments)
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="blockpruner-kills-") as name, prefect_server(Path(name)):
        folder = Path(name)
        fields = prepare(folder) | (with_tasks() if asked.tasks else {})
        commands = [["run", *_options(fields)], *([["speed", "latest", *_options(SPEED)]] if asked.speed else [])]

        def launch(workspace: Path, said: Path, change: int) -> Call:
            return _FreshCall(commands, workspace, said, change)

        fell = campaign(launch, folder, asked.kills, asked.seed, 60 * asked.minutes)
        left = sorted(path.name for path in (folder / "tmp").iterdir())
    print(f"{fell.total()} kills in {time.monotonic() - begun:.0f} s, seed {asked.seed}; every next call finished")
    for place, times in fell.most_common():
        print(f"{times:5}  {place}")
    print(f"left in the system's temporary folder: {left or 'nothing'}")


if __name__ == "__main__":
    main()
