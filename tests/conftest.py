"""What holds for every test: no network, no GPU unless asked for, nothing of the user's own, tiny models ready.

The environment is set before anything is imported that reads it. `tests/tiny_models.py` builds the models,
`tests/oracles.py` computes what they must answer.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

_HOME = Path(tempfile.mkdtemp(prefix="blockpruner-tests-"))
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)

os.environ.update(
    {
        # No hub, and none of the models and datasets that the user happens to have downloaded.
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(_HOME / "huggingface"),
        "TOKENIZERS_PARALLELISM": "false",
        # A Prefect of the tests' own.
        "PREFECT_HOME": str(_HOME / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        # Tiny tensors gain nothing from a second thread, and lose a hundredfold where it waits for a busy core; one
        # thread also adds up in the same order on every machine.
        "OMP_NUM_THREADS": "1",
        # Tables of the same width on every machine.
        "COLUMNS": "120",
        "NO_COLOR": "1",
    }
)
for _name in ("BLOCKPRUNER_WORKSPACE", "PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_PROFILE", "FORCE_COLOR"):
    os.environ.pop(_name, None)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a script's background job (`pytest &`) has it, and so would every command that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every machine; time is pytest-timeout's business, for two cores are often busy.
settings.register_profile("blockpruner", deadline=None, derandomize=True, database=None)
settings.load_profile("blockpruner")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare --gpu."""
    parser.addoption("--gpu", action="store_true", help="show the GPUs to the tests and run those marked gpu")


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, so that `auto` means the CPU and float32 wherever the tests run."""
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the GPU's tests unless they were asked for."""
    if config.getoption("--gpu"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: pytest --gpu"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Gives the folder of a tiny model with its tokenizer, by the key of `TINY_FAMILIES`; written once a session.

    The folders are shared: copy one (`shutil.copytree`) before damaging it.
    """
    from tests.tiny_models import save_tiny_model

    root = tmp_path_factory.mktemp("tiny-models")

    def folder(family: str) -> Path:
        path = root / family
        return path if path.is_dir() else save_tiny_model(path, family)

    yield folder
    shutil.rmtree(root, ignore_errors=True)
