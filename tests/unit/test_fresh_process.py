"""Programs in processes of their own: what they are given, and that they end with whoever started them."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from blockpruner import speed
from blockpruner.export.verify import ask
from blockpruner.fresh_process import Lifeline, run_fresh
from stages.runs import process_start
from tests.unit.child_processes import child, kill, wait_for

_SAYS_WHAT_IT_GETS = """
import json, sys
print(json.dumps([__name__, __file__, sys.argv, sys.stdin.read(), "blockpruner" in sys.modules, *sys.path]))
"""
_COMPUTES_LONG = """
import os, pathlib, time
pathlib.Path(__file__).with_name("new").write_text(str(os.getpid()))
pathlib.Path(__file__).with_name("new").rename(pathlib.Path(__file__).with_name("pid"))
time.sleep(600)
"""


@pytest.fixture
def long_program(tmp_path: Path) -> Path:
    (tmp_path / "long.py").write_text(_COMPUTES_LONG)
    return tmp_path / "long.py"


def test_a_program_is_run_as_python_runs_a_file(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(_SAYS_WHAT_IT_GETS)
    finished = run_fresh(program, "a", "--b", "c d", given="é")
    assert (finished.returncode, finished.stderr) == (0, "")
    name, file, arguments, given, is_ours, *searched = json.loads(finished.stdout)
    assert (name, file, arguments, given) == ("__main__", str(program), [str(program), "a", "--b", "c d"], "é")
    assert not is_ours
    assert not {str(tmp_path), str(Path(sys.modules["blockpruner"].__path__[0]))} & set(searched)
    program.write_text("raise SystemExit(7)")
    assert run_fresh(program).returncode == 7


def checks(program: str) -> None:
    ask(Path(program), Path(program).parent, {})


def times(program: str) -> None:
    speed._PROBE = Path(program)
    case = speed.SpeedCase(batch_size=1, prompt_tokens=1, new_tokens=1)
    speed.measure_speed([speed.TimedModel(Path())], [case], device="cpu", dtype="float32", num_repeats=1)


@pytest.mark.parametrize("work", [checks, times])
def test_a_program_ends_with_whoever_was_killed(work: Callable[[str], None], long_program: Path) -> None:
    with child(work, long_program) as process:
        wait_for(long_program.with_name("pid").exists)
        pid = int(long_program.with_name("pid").read_text())
        try:
            assert process_start(pid) is not None
            kill(process)
            wait_for(lambda: process_start(pid) is None)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_closing_a_lifeline_once_more_closes_nothing_else() -> None:
    lifeline = Lifeline()
    lifeline.close()
    another = Lifeline()
    lifeline.close()
    assert another.command("x")[3] == str(another.watched)
    another.close()
