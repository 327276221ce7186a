"""A real Prefect server and workers of its own, on 127.0.0.1, with everything that is in prefect.yaml deployed.

It is deployed from a folder like a clone of the repository, so that the workspace `data` is none of the user's.

Whatever was started is ended with the lab: the server, the workers and what they started, each known by a mark in its
environment. It is spoken to over HTTP, for this process may have another Prefect server at the same time.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx
import yaml

from tests.integration.command_line import ROOT

_START_S = 120.0
_ANSWER_S = 90.0
"""For the server to answer on a machine that has other work."""
_TRIES = 20
_MARK = "BLOCKPRUNER_PREFECT_LAB"
_QUICK = {
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "2",
    "PREFECT_SERVER_UI_ENABLED": "false",
}
"""What would otherwise have tests wait."""

ResultT = TypeVar("ResultT")


class PrefectLab:
    """A server, its workers, and the project's deployments."""

    def __init__(self, folder: Path) -> None:
        """Begin with nothing started. `folder`: new; what Prefect keeps, logs, and a copy of prefect.yaml go there."""
        self.folder, self._mark = folder, uuid.uuid4().hex
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
            **_QUICK,
            "PYTHONPATH": str(ROOT),
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            _MARK: self._mark,
        }
        self.repository = folder / "repository"
        """What a clone has: prefect.yaml and the demo's files."""
        self.repository.mkdir(parents=True)
        self._prefect_yaml = self.repository / "prefect.yaml"
        self._client = httpx.Client(base_url=self.environment["PREFECT_API_URL"], timeout=_ANSWER_S, trust_env=False)

    # --- starting and ending ------------------------------------------------------------------------------------------

    def start_server(self) -> None:
        """Start it, and wait until it answers."""
        server = self._start("server", "server", "start", "--host", "127.0.0.1", "--port", self.port)
        wait_until(lambda: server.poll() is not None or self._answers(), _START_S)
        assert server.poll() is None, self.log("server")

    def start_worker(self, name: str) -> int:
        """Start a worker that takes one run at a time, and wait until it does; its process id."""
        worker = self._start(name, "worker", "start", "--pool", "blockpruner", "--name", name, "--limit", "1")
        wait_until(lambda: worker.poll() is not None or "started!" in self.log(name), _START_S)
        assert worker.poll() is None, self.log(name)
        return worker.pid

    def prefect(self, *arguments: object) -> str:
        """Call Prefect's command line from the folder of the deployments, with nobody to answer its questions."""
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *map(str, arguments)],
            cwd=self.repository,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def deploy(self) -> None:
        """Deploy everything that is in prefect.yaml."""
        shutil.copy(ROOT / "prefect.yaml", self._prefect_yaml)
        shutil.copytree(ROOT / "data/demo", self.repository / "data/demo")  # which its parameters name
        self.prefect("work-pool", "create", "--type", "process", "blockpruner")
        self.prefect("deploy", "--all", "--no-prompt")

    def schedule(self, deployment: str, parameters: dict[str, Any], within_s: float) -> datetime:
        """Deploy one again with other parameters and an hour that is near: a full minute, which is given."""
        due = (datetime.now(UTC) + timedelta(seconds=within_s)).replace(second=0, microsecond=0)
        content = yaml.safe_load(self._prefect_yaml.read_text())
        (changed,) = [each for each in content["deployments"] if each["name"] == deployment]
        changed["parameters"] = parameters
        changed["schedules"][0]["cron"] = f"{due.minute} {due.hour} * * *"
        self._prefect_yaml.write_text(yaml.safe_dump(content))
        self.prefect("deploy", "--name", deployment, "--no-prompt")
        return due

    def kill_server(self) -> None:
        """As a machine that is switched off."""
        self._processes["server"].kill()
        self._processes["server"].wait()

    def close(self) -> None:
        """End everything that was started here, and whatever that started."""
        for process in self._processes.values():
            process.kill()
            process.wait()
        for pid in self._marked():
            os.kill(pid, signal.SIGKILL)
        self._client.close()

    def log(self, name: str) -> str:
        """What the server or a worker has said."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _start(self, name: str, *arguments: object) -> subprocess.Popen[bytes]:
        """Start Prefect's command line at the head of a process group of its own."""
        with (self.folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "prefect", *map(str, arguments)],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self._processes[name]

    def _answers(self) -> bool:
        try:
            return self._client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def _marked(self) -> Iterable[int]:
        wanted = f"{_MARK}={self._mark}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if wanted in path.read_bytes().split(b"\0"):
                    yield int(path.parent.name)
            except OSError:  # gone, or somebody else's
                continue

    # --- what it holds ------------------------------------------------------------------------------------------------

    def deployment(self, name: str) -> dict[str, Any]:
        """A deployment, by the names of flow and deployment."""
        found: dict[str, Any] = self._ask("GET", f"/deployments/name/{name}")
        return found

    def begin(self, deployment: str, **parameters: object) -> str:
        """Have a deployment run; the flow run's id."""
        path = f"/deployments/{self.deployment(deployment)['id']}/create_flow_run"
        return str(self._ask("POST", path, {"parameters": parameters, "state": {"type": "SCHEDULED"}})["id"])

    def state(self, flow_run_id: str) -> str:
        """The name of a flow run's state."""
        return str(self._ask("GET", f"/flow_runs/{flow_run_id}")["state_name"])

    def state_becomes(self, flow_run_id: str, name: str, patience_s: float = 120.0) -> None:
        """Wait until a flow run is in a state."""
        try:
            wait_until(lambda: self.state(flow_run_id) == name, patience_s)
        except AssertionError as error:
            logs = "\n".join(self.log(each) for each in self._processes if each != "server")
            raise AssertionError(f"it is {self.state(flow_run_id)} and not {name}\n{logs}") from error

    def flow_runs(self, deployment: str) -> list[dict[str, Any]]:
        """The runs of a deployment."""
        return self._found("flow_runs", deployments={"id": {"any_": [self.deployment(deployment)["id"]]}})

    def task_states(self, flow_run_id: str) -> dict[str, str]:
        """The state of each task of a flow run, by its name."""
        tasks = self._found("task_runs", flow_runs={"id": {"any_": [flow_run_id]}})
        return {task["name"]: task["state_name"] for task in tasks}

    def artifact_keys(self, flow_run_id: str) -> set[str | None]:
        """The names under which a flow run's artifacts are shown."""
        return {found["key"] for found in self._found("artifacts", flow_runs={"id": {"any_": [flow_run_id]}})}

    def messages(self, flow_run_id: str) -> list[str]:
        """What a flow run has logged."""
        logs = self._found("logs", logs={"flow_run_id": {"any_": [flow_run_id]}})
        return [log["message"] for log in logs]

    def cancel(self, flow_run_id: str) -> None:
        """As `prefect flow-run cancel` and the button do."""
        state = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
        self._ask("POST", f"/flow_runs/{flow_run_id}/set_state", state)

    def _found(self, kind: str, **filters: object) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._ask("POST", f"/{kind}/filter", filters)
        return found

    def _ask(self, method: str, path: str, content: object = None) -> Any:
        """Ask the server, and again where its database is busy, as Prefect's own clients do."""
        for _ in range(_TRIES):
            answer = self._client.request(method, path, json=content)
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                break
            time.sleep(1)
        return answer.raise_for_status().json()


def wait_until(condition: Callable[[], bool], patience_s: float) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {patience_s:.0f} s in vain"
        time.sleep(0.25)
