"""Upload an export to the Hugging Face hub. What can be known to fail is refused before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from blockpruner.errors import ConfigurationError, one_line
from blockpruner.export.names import AUTO_TAKES, FormatChoice

_REPLACED = ("*.safetensors", "*.safetensors.index.json", "*.gguf", "*.py")
"""Of an earlier push, what would be loaded in place of the new files or beside them."""


def repository_of(repo_id: str, name: str, *, several: bool) -> str:
    """The repository that an export goes to: with several formats, each has one that is named after it."""
    return f"{repo_id}-{name}" if several else repo_id


def check_repositories(repo_id: str, formats: Sequence[FormatChoice]) -> None:
    """Refuse repositories that exports in these formats cannot be pushed to.

    Raises:
        ConfigurationError: if a name is none, nobody is logged in, the hub is switched off or cannot be reached, or a
            repository is there and public: what is pushed is meant to be private, and would be published.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    # What 'auto' will be is not known yet: any of those that it takes.
    names = dict.fromkeys(taken for name in formats for taken in (AUTO_TAKES if name == "auto" else (name,)))
    repositories = [repository_of(repo_id, name, several=len(set(formats)) > 1) for name in names]
    for repository in repositories:
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            raise ConfigurationError(
                f"{repository!r} names no repository of the hub; give OWNER/NAME, short enough for the format's name "
                "behind it where there are several"
            ) from error
    if constants.is_offline_mode():
        raise ConfigurationError(
            "nothing can be pushed while HF_HUB_OFFLINE is set; unset it, or leave out --push-to-hub"
        )
    if get_token() is None:
        raise ConfigurationError("nobody is logged in to the hub; log in with `hf auth login`, then push")
    for repository in dict.fromkeys(repositories):
        _refuse_public(repository)


def _refuse_public(repo_id: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        is_private = HfApi().model_info(repo_id).private
    except RepositoryNotFoundError:
        return
    except _refusals() as error:
        raise ConfigurationError(f"the hub cannot be asked for {repo_id} ({one_line(error)})") from error
    if not is_private:
        raise ConfigurationError(
            f"{repo_id} is there and public, and the model would be published with it; make it private on the hub, or "
            "give another name"
        )


def push_folder(folder: Path, repo_id: str) -> str:
    """Upload a folder as a private model repository, which is made if missing; gives its address.

    Raises:
        ConfigurationError: if the hub refuses or cannot be reached; the folder stays where it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repository = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Pruned by blockpruner",
            delete_patterns=list(_REPLACED),
        )
    except _refusals() as error:
        raise ConfigurationError(
            f"{repo_id} was not pushed ({one_line(error)}); the model is kept in {folder}: give the same command again"
        ) from error
    return str(repository)


def _refusals() -> tuple[type[Exception], ...]:
    """How the hub's client says that something did not work; without a network its HTTP library speaks for itself."""
    from huggingface_hub.errors import HfHubHTTPError

    # Which library that is depends on the client's version; the client's own error derives from the library's.
    http_errors = (base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    return (HfHubHTTPError, *http_errors, OSError, ValueError)
