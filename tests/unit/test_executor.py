"""Executors: what is refused before anything is computed, and that nothing needs Ray without being asked."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from blockpruner.errors import ConfigurationError
from flows.recipe import make_recipe
from flows.reporter import LOADING
from stages.executor import ExecutorSettings, require_ray
from stages.ray_session import workers_environment
from tests.integration.command_line import ROOT, blockpruner


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"executor": "rya"}, "unknown executor 'rya'; valid are local, ray; did you mean 'ray'?"),
        ({"executor": "ray", "workers": 0}, "workers is 0"),
        ({"executor": "ray", "workers": True}, "workers is True"),
        ({"executor": "ray", "workers": 2.5}, "workers is 2.5"),
        ({"workers": 2}, "workers is for executor ray; give --executor ray as well"),
        ({"ray_address": "127.0.0.1:6379"}, "ray_address is for executor ray"),
        ({"executor": "ray", "ray_address": "127.0.0.1"}, "ray_address is '127.0.0.1'; give HOST:PORT"),
        ({"executor": "ray", "ray_address": "here:99999"}, "ray_address is 'here:99999'; give HOST:PORT"),
        ({"executor": "ray", "ray_address": "ray://here:1"}, "ray_address is 'ray://here:1'; give HOST:PORT"),
        ({"executor": "ray", "ray_address": " "}, "ray_address is ' '"),
        ({"executor": "ray", "ray_address": 6379}, "ray_address is 6379"),
        ({"executor": "ray", "scorer": "plain"}, "scorer plain knows no executor ray"),
        ({"executor": "ray", "strategy": "laco"}, "strategy laco merges one model, and knows no executor ray"),
        ({"executor": "ray", "device": "cuda:1"}, "device cuda:1 with executor ray: Ray chooses the GPU; give cuda"),
    ],
)
def test_an_executor_that_cannot_be_is_one_clear_line(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make_recipe({"model": "m", **fields})
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_the_settings_of_a_recipe() -> None:
    recipe = make_recipe({"model": "m", "executor": "ray", "workers": 3, "ray_address": "[::1]:6379", "device": "cuda"})
    assert recipe.spread == ExecutorSettings(executor="ray", workers=3, ray_address="[::1]:6379")
    assert make_recipe({"model": "m"}).spread == ExecutorSettings()


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("stages.executor.find_spec", lambda _: None)
    model = ROOT / "data/demo/model"
    outcome = blockpruner("search", "--model", model, "--num-blocks", 1, "--executor", "ray", "--workspace", tmp_path)
    assert outcome.status == 2
    (line,) = [each for each in outcome.stderr.splitlines() if each != f"{LOADING} ..."]  # said by whoever comes first
    assert "needs Ray" in line
    assert 'pip install -c constraints.txt -e ".[ray]"' in line
    assert not list(tmp_path.glob("artifacts/*/*")), "refused before anything is computed"


def test_a_cluster_that_does_not_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.executor.find_spec", lambda _: "installed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = ExecutorSettings(executor="ray", ray_address=address)
        with pytest.raises(ConfigurationError, match=f"no Ray cluster answers at {address}"):
            require_ray(settings)
        taken.listen()
        require_ray(settings)  # of one that is silent Ray has to find out


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b""])
def test_what_answers_otherwise_than_ray_is_refused_at_once(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.executor.find_spec", lambda _: "installed")

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(64)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        Thread(target=serve, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigurationError, match=f"what answers at {address} is no Ray cluster; give HOST:PORT"):
            require_ray(ExecutorSettings(executor="ray", ray_address=address))


def test_a_search_here_imports_no_ray() -> None:
    program = "import sys, stages.search, flows.runner; sys.exit(any('ray' in n.split('.')[:1] for n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


_FOR_TORCH = {
    "OMP_WAIT_POLICY": "passive",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "THP_MEM_ALLOC_ENABLE": "1",
}


@pytest.mark.parametrize("given", [{}, {"THP_MEM_ALLOC_ENABLE": "0", "OMP_WAIT_POLICY": "active"}])
def test_torch_is_told_what_suits_a_sweep_unless_the_user_has_told_it(given: dict[str, str]) -> None:
    code = f"import flows, os; print([os.environ[name] for name in {list(_FOR_TORCH)}])"
    others = {name: value for name, value in os.environ.items() if name not in _FOR_TORCH}
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=others | given, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == str([*(_FOR_TORCH | given).values()])


def test_workers_of_a_ray_that_runs_already_are_told_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in _FOR_TORCH.items():
        monkeypatch.setenv(name, value)
    settings = ExecutorSettings(executor="ray", ray_address="127.0.0.1:6379")
    assert workers_environment(settings) == _FOR_TORCH
    assert workers_environment(ExecutorSettings(executor="ray", workers=2)) == {}
