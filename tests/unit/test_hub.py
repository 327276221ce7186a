"""Pushing to the hub, against a stand-in for its API: what is sent, and what is refused before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from blockpruner.errors import ConfigurationError
from blockpruner.hub import check_repository, push_folder
from tests.integration.command_line import blockpruner
from tests.tiny_models import tiny_rows


class Hub:
    """Notes what it is asked for."""

    def __init__(self, broken: bool = False) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.broken = broken

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.calls.append(("create", {"repo_id": repo_id, **options}))
        return f"https://hub.example/{repo_id}"

    def upload_folder(self, **options: Any) -> None:
        if self.broken:
            raise OSError("the line\nis cut")
        self.calls.append(("upload", options))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    return hub


def test_a_folder_becomes_a_private_repository(hub: Hub, tmp_path: Path) -> None:
    assert push_folder(tmp_path, "me/smaller") == "https://hub.example/me/smaller"
    (_, created), (_, uploaded) = hub.calls
    assert (created["repo_id"], created["private"], created["exist_ok"]) == ("me/smaller", True, True)
    assert (uploaded["repo_id"], uploaded["folder_path"]) == ("me/smaller", tmp_path)


def test_what_the_hub_refuses_is_one_line_and_says_where_the_model_is(hub: Hub, tmp_path: Path) -> None:
    hub.broken = True
    with pytest.raises(ConfigurationError, match="the line is cut") as caught:
        push_folder(tmp_path, "me/smaller")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "a/b/c", "me/..", "me/a b", "-x"])
def test_names_that_are_none(hub: Hub, name: str) -> None:
    with pytest.raises(ConfigurationError, match="OWNER/NAME"):
        check_repository(name)
    assert hub.calls == []


def test_nobody_logged_in_or_no_hub_is_said_first(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigurationError, match="hf auth login"):
        check_repository("me/smaller")
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    with pytest.raises(ConfigurationError, match="HF_HUB_OFFLINE"):
        check_repository("me/smaller")


def test_the_command_pushes_every_format(hub: Hub, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "cal.txt").write_text("\n".join(tiny_rows(40)))
    given = ["--workspace", tmp_path / "ws"]
    model = ["--model", tiny_folder("llama"), "--calibration", tmp_path / "cal.txt", "--num-samples", 40]
    assert blockpruner("search", *model, "--sequence-length", 16, "--num-blocks", 1, *given).status == 0
    formats = ["--format", "transformers", "--format", "zeroed"]
    outcome = blockpruner("export", "latest", *formats, "--push-to-hub", "me/smaller", *given)
    assert outcome.status == 0
    names = ["me/smaller-transformers", "me/smaller-zeroed"]
    assert [options["repo_id"] for call, options in hub.calls if call == "upload"] == names
    assert all(
        (Path(options["folder_path"]) / "README.md").is_file() for call, options in hub.calls if call == "upload"
    )
    assert "pushed to https://hub.example/me/smaller-zeroed" in outcome.stderr
