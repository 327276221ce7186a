"""Upload an export to the Hugging Face hub. What can be known to fail is refused before anything is computed."""

from __future__ import annotations

from pathlib import Path

from blockpruner.errors import ConfigurationError


def check_repository(repo_id: str) -> None:
    """Refuse a repository that nothing can be pushed to.

    Raises:
        ConfigurationError: if the name is none, nobody is logged in, or the hub is switched off.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigurationError(f"{repo_id!r} names no repository of the hub; give OWNER/NAME") from error
    if constants.is_offline_mode():
        raise ConfigurationError(
            "nothing can be pushed while HF_HUB_OFFLINE is set; unset it, or leave out --push-to-hub"
        )
    if get_token() is None:
        raise ConfigurationError("nobody is logged in to the hub; log in with `hf auth login`, then push")


def push_folder(folder: Path, repo_id: str) -> str:
    """Upload a folder as a private model repository, which is made if missing; gives its address.

    Raises:
        ConfigurationError: if the hub refuses or cannot be reached; the folder stays where it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        repository = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Pruned by blockpruner")
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigurationError(
            f"{repo_id} was not pushed ({reason[:200]}); the model is kept in {folder}: give the same command again"
        ) from error
    return str(repository)
