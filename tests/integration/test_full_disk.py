"""A disk that fills up in the middle of each stage: one line, all that was finished is whole, and the command goes on.

The disk is a small one in memory (tmpfs), filled to its last byte as the stage begins. Where none may be mounted, the
process is refused every new file instead.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration import test_baichuan as baichuan
from tests.integration.command_line import Outcome, blockpruner
from tests.integration.file_changes import on_change
from tests.integration.loaded_processes import Command, load_exports_in_forks
from tests.tiny_models import tiny_rows

_DISK_BYTES = 8 << 20
_FILLER = "filler"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that is a small disk, if one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(folder)]
    subprocess.run(mount, capture_output=True, check=False)
    yield folder
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def arguments(tmp_path: Path, tiny_folder: Callable[[str], Path], disk: Path) -> Callable[[str], list[object]]:
    """The command line for each command; "fold" is a search in a model that has to be folded first."""
    (tmp_path / "cal.txt").write_text("\n".join(tiny_rows(40)))
    text = ["--calibration", tmp_path / "cal.txt", "--sequence-length", 16, "--num-samples", "all"]
    whole = [*text, "--model", tiny_folder("llama")]
    published = baichuan.written(tmp_path / "baichuan")
    given: dict[str, list[object]] = {
        "search": ["search", *whole, "--num-blocks", 2],
        "baseline": ["baseline", *whole],
        "fold": ["search", *text, "--model", published, "--num-blocks", 2],
        "speed": ["speed", "latest", *("--batch-sizes", 1, "--prompt-tokens", 4, "--new-tokens", 1, "--repeats", 1)],
    }
    return lambda command: [*given.get(command, [command, "latest"]), "--workspace", disk / "ws", "--json"]


def fill_at(stage: str, disk: str) -> None:
    """In a process about to begin: when this stage makes its folder, there is no space left."""

    def fill(_: int) -> None:
        if not Path(disk).is_mount():
            on_change(disk, _refuse, event_wanted="open")
            return
        with contextlib.suppress(OSError), Path(disk, _FILLER).open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    on_change(disk, fill, event_wanted="os.mkdir", name_wanted=f"/artifacts/{stage}/.tmp-")


def _refuse(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "what was to be opened")


def digests(disk: Path) -> dict[Path, str]:
    files = (path for path in disk.glob("ws/artifacts/**/*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


CASES = [
    ("calibrate", "search", []),
    ("baseline", "baseline", ["search"]),
    ("search", "search", ["baseline"]),
    ("export", "export", ["search"]),
    ("evaluate", "evaluate", ["search", "export"]),
    ("speed", "speed", ["search", "export"]),
    ("fold", "fold", ["search"]),
]


@pytest.mark.parametrize(("stage", "command", "before"), CASES, ids=[stage for stage, _, _ in CASES])
def test_a_disk_that_fills_up_in_a_stage(
    stage: str,
    command: str,
    before: list[str],
    arguments: Callable[[str], list[object]],
    disk: Path,
    tmp_path: Path,
) -> None:
    for number, each in enumerate(before):
        assert run(tmp_path / f"before{number}", arguments(each)).status == 0
    earlier = digests(disk)
    failed = run(tmp_path / "failed", arguments(command), stage=stage, disk=disk)
    *_, last = failed.stderr.splitlines()
    assert (failed.status, failed.stdout) == (2, ""), failed
    assert "Traceback" not in failed.stderr
    assert failed.stderr.count("Error: ") == 1
    assert last.startswith(f"Error: stage {stage}: ")
    assert "No space left on device" in last
    assert "free some space (the stage needs more than the " in last
    if disk.is_mount():
        assert str(disk) in last
        assert (disk / _FILLER).stat().st_size > _DISK_BYTES // 4
    now = digests(disk)
    assert {path: now.get(path) for path in earlier} == earlier
    assert not [path for path in now if path.parent.parent.name == stage and path not in earlier]

    (disk / _FILLER).unlink(missing_ok=True)
    again = run(tmp_path / "again", arguments(command))
    assert again.status == 0, again.stderr
    assert "Traceback" not in again.stderr
    now = digests(disk)
    assert {path: now.get(path) for path in earlier} == earlier
    assert list(disk.glob(f"ws/artifacts/{stage}/[!.]*/manifest.json"))
    assert not list(disk.glob("ws/**/*.tmp*"))
    statuses = [each["status"] for each in blockpruner("runs", "--workspace", disk / "ws", "--json").json]
    assert statuses == ["completed", statuses[1], *["completed"] * len(before)]
    assert statuses[1] in ("failed", "crashed")  # crashed: there was no space for saying that it failed
    stored = blockpruner("sql", "SELECT status FROM runs ORDER BY run_id DESC", "--workspace", disk / "ws", "--json")
    assert sorted(row["status"] for row in stored.json) == sorted(statuses)


def run(said: Path, arguments: list[object], stage: str | None = None, disk: Path | None = None) -> Outcome:
    """Call the command line in a process of its own; with a stage, the disk fills up in it."""
    filling = [(fill_at, [stage, str(disk)])] if stage is not None else []
    command = Command(arguments, said, [(load_exports_in_forks, []), *filling])
    try:
        return command.outcome()
    finally:
        command.end()
