"""The hub, against a stand-in for its API: what is sent and fetched, what is refused before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from blockpruner.checkpoint import Checkpoint
from blockpruner.errors import ConfigurationError
from blockpruner.hub import check_repositories, push_folder
from tests.integration.command_line import blockpruner
from tests.tiny_models import save_tiny_model, tiny_rows


class Hub:
    """Notes what it is asked for."""

    def __init__(self, broken: bool = False) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.broken = broken
        self.public: set[str] = set()
        self.private: set[str] = set()

    def model_info(self, repo_id: str) -> SimpleNamespace:
        if repo_id not in self.public | self.private:
            response = httpx.Response(404, request=httpx.Request("GET", "https://hub.example"))
            raise RepositoryNotFoundError("there is none", response=response)
        return SimpleNamespace(private=repo_id in self.private)

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


def test_what_an_earlier_push_left_does_not_stay(hub: Hub, tmp_path: Path) -> None:
    """A model.safetensors there would be loaded in place of the new shards, and code that is no longer named, kept."""
    push_folder(tmp_path, "me/smaller")
    there = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "model.gguf"]
    kept = ["README.md", "config.json", ".gitattributes"]
    patterns = hub.calls[-1][1]["delete_patterns"]
    code = ["modeling_blockpruned.py"]
    assert list(filter_repo_objects([*there, *code, *kept], allow_patterns=patterns)) == [*there, *code]


def test_every_repository_must_have_a_name(hub: Hub) -> None:
    """Of several formats each has one of its own, which is longer."""
    name = "me/" + "a" * 90
    check_repositories(name, ["stock"])
    with pytest.raises(ConfigurationError, match="a-transformers"):
        check_repositories(name, ["stock", "transformers"])
    with pytest.raises(ConfigurationError, match="a-transformers"):
        check_repositories(name, ["gguf", "auto"])


def test_nothing_is_published_by_mistake(hub: Hub) -> None:
    """Before anything is computed."""
    hub.public, hub.private = {"me/known-stock"}, {"me/mine"}
    check_repositories("me/mine", ["stock"])
    check_repositories("me/known", ["stock"])
    with pytest.raises(ConfigurationError, match="me/known-stock is there and public"):
        check_repositories("me/known", ["transformers", "stock"])
    assert hub.calls == []


def test_what_the_hub_refuses_is_one_line_and_says_where_the_model_is(hub: Hub, tmp_path: Path) -> None:
    hub.broken = True
    with pytest.raises(ConfigurationError, match="the line is cut") as caught:
        push_folder(tmp_path, "me/smaller")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "a/b/c", "me/..", "me/a b", "-x"])
def test_names_that_are_none(hub: Hub, name: str) -> None:
    with pytest.raises(ConfigurationError, match="OWNER/NAME"):
        check_repositories(name, ["stock"])
    assert hub.calls == []


def test_nobody_logged_in_or_no_hub_is_said_first(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigurationError, match="hf auth login"):
        check_repositories("me/smaller", ["stock"])
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    with pytest.raises(ConfigurationError, match="HF_HUB_OFFLINE"):
        check_repositories("me/smaller", ["stock"])


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


def test_without_a_network_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    api = huggingface_hub.HfApi  # the client itself, and nobody listens where it calls
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api(endpoint="http://127.0.0.1:9", token="hf_x"))
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    with pytest.raises(ConfigurationError, match=r"cannot be asked for me/smaller \(.*Connection refused.*\)"):
        check_repositories("me/smaller", ("auto",))
    with pytest.raises(ConfigurationError, match=r"me/smaller was not pushed \(.*\); the model is kept in "):
        push_folder(tmp_path, "me/smaller")


def test_terms_and_card_are_fetched_from_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The licence is to be carried over, and is not in every case in LICENSE."""
    folder = save_tiny_model(tmp_path / "snapshot")
    there = ["README.md", "NOTICE", "LICENSE.md", "USE_POLICY.md", "additional_chat_templates/rag.jinja", "x.bin"]
    fetched: list[str] = []

    def download(hub_id: str, *, allow_patterns: list[str]) -> str:
        fetched.extend(filter_repo_objects(there, allow_patterns=allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = Checkpoint.open("someone/model")
    assert fetched == there[:-1]
    assert (checkpoint.hub_id, checkpoint.public_name) == ("someone/model", "someone/model")
    local = Checkpoint.open(str(folder))
    assert (local.hub_id, local.public_name) == (None, "snapshot")
