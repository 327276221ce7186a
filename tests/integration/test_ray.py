"""A search on Ray, in processes and clusters as they are: workers are killed, a machine goes, and no bit changes.

Everything listens on loopback. Without Ray these tests are skipped; `.ci/run` installs it.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

import stages.ray_crew
import stages.search
from blockpruner.calibration import save_token_ids
from blockpruner.checkpoint import Checkpoint
from blockpruner.journal import SearchJournal
from blockpruner.progress import Progress, ProgressCallback, silent
from blockpruner.scoring.micro_batches import BatchRequest
from blockpruner.trace import read_trace
from stages.contract import ArtifactRef, Runtime
from stages.executor import ExecutorSettings
from stages.runs import RunStore
from stages.search import STAGE, SearchConfig, SearchInputs
from tests.integration.command_line import start
from tests.tiny_models import tiny_rows, tiny_token_ids

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install -c constraints.txt -e '.[ray]'"),
]

NUM_SEQUENCES, NUM_BLOCKS = 8, 3
TOKENS = tiny_token_ids(NUM_SEQUENCES, 12, seed=1)
LOOPBACK = "127.0.0.1"
ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # which is how Ray takes 127.0.0.1 for an address of its own
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "7" * 64,
}
NODE = {"num_cpus": 1, "node_ip_address": LOOPBACK, "object_store_memory": 80 * 2**20}


class InterruptionError(Exception):
    """Stands for a process that is killed."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each. One test takes the second one away: the tests' order matters."""
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="bp-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder,
    ):
        for name, value in {**ENVIRONMENT, "RAY_TMPDIR": folder}.items():
            patch.setenv(name, value)
        (Path(folder) / "ray").mkdir()
        from ray.cluster_utils import Cluster

        head = {**NODE, "include_dashboard": False, "temp_dir": folder}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(**NODE)
        yield cluster
        cluster.shutdown()


@pytest.fixture
def inputs(tiny_folder: Callable[[str], Path], tmp_path: Path) -> SearchInputs:
    folder = tmp_path / "calibration"
    folder.mkdir()
    save_token_ids(TOKENS, folder)
    return SearchInputs(Checkpoint.open(str(tiny_folder("llama"))), ArtifactRef("c" * 64, folder))


@pytest.fixture(autouse=True)
def _every_score_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.search, "SearchJournal", functools.partial(SearchJournal, partial_interval_s=0))


def search(
    folder: Path,
    inputs: SearchInputs,
    executor: ExecutorSettings | None = None,
    progress: ProgressCallback = silent,
    metric: Any = "perplexity",
) -> list[str]:
    """Run the stage with the checkpoints in `folder`; the trace without the times."""
    out_dir = folder / f"out-{time.monotonic_ns()}"
    out_dir.mkdir(parents=True)
    runtime = Runtime("cpu", 1, executor=executor or ExecutorSettings(), progress=progress, state_dir=folder / "state")
    STAGE.run(SearchConfig(num_blocks=NUM_BLOCKS, metric=metric), inputs, out_dir, runtime)
    trace = read_trace(out_dir)
    steps = [step.model_dump_json(exclude={"seconds", "work_saved"}) for step in trace.steps]
    return [trace.summary.model_dump_json(), *steps]


def on(cluster: Any, num_workers: int) -> ExecutorSettings:
    return ExecutorSettings(executor="ray", workers=num_workers, ray_address=cluster.address)


def test_a_killed_worker_and_a_removed_machine_change_no_bit(
    tmp_path: Path,
    inputs: SearchInputs,
    cluster: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import ray

    gave, given, nodes = stages.ray_crew.RayCrew.give, 0, []

    def kills_the_13th(self: stages.ray_crew.RayCrew, worker: str, request: BatchRequest) -> None:
        """Which is asked for a micro-batch in the middle of the first step. Whoever replaces it is waited for."""
        nonlocal given
        given += 1
        coming = [ref for ref, member in self._under_way.items() if member.state != "ready" and not nodes]
        ray.wait(coming, num_returns=len(coming), timeout=60) if coming else None
        actor = self._members[worker].actor
        pid = ray.get(actor.__ray_call__.remote(lambda _: os.getpid())) if given == 13 else None
        gave(self, worker, request)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)

    def removes_a_machine(progress: Progress) -> None:
        """When the second step is half done."""
        if not nodes and progress.note == "step 2" and progress.done > 8 + 3:
            nodes.append(next(iter(cluster.worker_nodes)))
            raylet = psutil.Process(nodes[0].all_processes["raylet"][0].process.pid)
            there = raylet.children(recursive=True)  # which outlive it for some seconds, as on no machine that is off
            cluster.remove_node(nodes[0], allow_graceful=False)
            for process in there:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(there, timeout=20)

    monkeypatch.setattr(stages.ray_crew.RayCrew, "give", kills_the_13th)
    with caplog.at_level(logging.WARNING):
        trace = search(tmp_path / "ray", inputs, on(cluster, 2), removes_a_machine, "kl")
    assert nodes
    assert caplog.text.count("a worker was lost") == 2, "the one that was killed, and the one of the machine"
    assert trace == search(tmp_path / "local", inputs, metric="kl")


def test_a_search_goes_on_with_another_executor(tmp_path: Path, inputs: SearchInputs, cluster: Any) -> None:
    """Begun here, gone on with on Ray, ended here; interrupted within a step each time."""
    seen: list[float] = []

    def dies_after(done: int) -> ProgressCallback:
        def progress(progress: Progress) -> None:
            seen.append(progress.done)
            if progress.done >= done:
                raise InterruptionError

        return progress

    for executor, done in ((None, 4), (on(cluster, 1), 11), (None, 16)):
        with pytest.raises(InterruptionError):
            search(tmp_path / "both", inputs, executor, dies_after(done))
    assert seen == sorted(seen), "nothing was computed again"
    trace = search(tmp_path / "both", inputs, on(cluster, 1))
    assert trace == search(tmp_path / "local", inputs)


def long_search(model: Path, folder: Path) -> list[object]:
    """A command that has a Ray of its own for a minute."""
    text = folder / "text.txt"
    text.write_text("\n".join(tiny_rows(200)))
    sequences = ["--calibration", text, "--num-samples", "all", "--sequence-length", 16, "--batch-size", 1]
    what = ["--num-blocks", 7, "--metric", "js", "--executor", "ray", "--workspace", folder / "workspace"]
    return ["search", "--model", model, *sequences, *what]


def test_a_ray_of_its_own_that_dies_ends_the_command_in_one_line(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Ray would end the process after ten seconds, with nothing said and the run's record as it was."""
    process = start(*long_search(tiny_folder("llama"), tmp_path))
    try:
        family = _family_that_scores(process.pid, tmp_path / "workspace")
        (raylet,) = [each for each in family if each.name() == "raylet"]
        raylet.kill()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 2, said
    assert said.splitlines()[-1].startswith("Error: Ray on this machine has ended: ")
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    (record,) = RunStore(tmp_path / "workspace").list()
    assert record.status == "failed"


def test_an_order_to_end_ends_ray_and_its_workers(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """And while it runs nothing of it listens anywhere but on loopback."""
    home = tmp_path / "home"
    home.mkdir()
    files = tempfile.mkdtemp(prefix="bp-tests-", dir="/tmp")  # short: Ray's sockets lie in it
    environment = {"HOME": str(home), "TMPDIR": files}
    process = start(*long_search(tiny_folder("llama"), tmp_path), **environment)
    try:
        family = _family_that_scores(process.pid, tmp_path / "workspace")
        (folder,) = Path(files).glob("bp-*")
        assert folder.stat().st_mode & 0o077 == 0, "open to nobody else"
        listening = {at.laddr.ip for each in family for at in each.net_connections("tcp") if at.status == "LISTEN"}
        assert listening <= {LOOPBACK, f"::ffff:{LOOPBACK}", "::1"}
        assert listening
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, said
    *before, last = said.splitlines()
    assert last.startswith("Terminated. What was finished is kept: give the same command again, or `blockpruner resume ")
    assert "ray" not in "".join(before).lower().replace("array", ""), "Ray's own reports"
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    assert not (home / ".ray").exists()
    assert not list(Path(files).glob("bp-*"))
    shutil.rmtree(files)


def _family_that_scores(pid: int, workspace: Path) -> list[psutil.Process]:
    """The command's processes, once its workers have scored something."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if list(workspace.glob("state/**/step-0001.json")):
            return psutil.Process(pid).children(recursive=True)
        time.sleep(0.2)
    raise AssertionError("nothing was scored in time")
