"""Publishing a smaller model on the Hugging Face hub."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from moe_lens.errors import MoeLensError, UsageError

# The hub's client has changed its HTTP library more than once; its own error is one of that
# library's, beside those for a network that is not there.
_TransportError: type[Exception] = HfHubHTTPError.__bases__[0]

_STALE = ("model*.safetensors", "pictures/*")
"""What an earlier upload may have left there that is not of this model: loaders read all weight
files that they find."""

_REFUSED = {401: "the token is not valid", 403: "the token may not write there"}


def check_upload(repo: str) -> None:
    """Find out before hours of calibration that the hub would refuse.

    Raises:
        UsageError: `repo` is no name of a repository with its owner.
        MoeLensError: The hub cannot be reached, or does not know who asks.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo!r} cannot be the name of a repository: {error}") from error
    if "/" not in repo:
        raise UsageError(f"name the owner as well: --upload-repo OWNER/{repo}")
    with _explained(f"leave --upload-repo out, or upload afterwards with hf upload {repo} DIR"):
        HfApi().whoami()


def upload(folder: str | Path, repo: str) -> str:
    """Upload a smaller model; the repository is made if there is none.

    Weight files and pictures that an earlier upload left in the repository are deleted, since
    loaders read all weight files that they find. An upload that broke off goes on where it was
    when it is called again.

    Args:
        folder: What `compress` or `write` made.
        repo: ``owner/name``.

    Returns:
        The address of the repository.

    Raises:
        UsageError: The folder holds no model, or `repo` is no name of a repository.
        MoeLensError: The hub cannot be reached, or refuses; the folder stays as it is.
    """
    place = Path(folder).expanduser()
    if not (place / "config.json").is_file():
        raise UsageError(f"{place} holds no model (no config.json), so nothing is uploaded")
    check_upload(repo)
    api = HfApi()
    line = shlex.join(["hf", "upload", repo, str(place)])
    remedy = f"the model is complete in {place}, to upload it later: {line}"
    with _explained(remedy):
        made = api.create_repo(repo, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=place,
            repo_type="model",
            commit_message="Upload by moe-lens",
            delete_patterns=list(_STALE),
        )
    return str(made)


@contextmanager
def _explained(remedy: str) -> Iterator[None]:
    """Turn what the hub's client raises into one sentence with what to do."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise MoeLensError(
            "there is no token for the Hugging Face hub: log in with hf auth login, or set "
            f"HF_TOKEN; {remedy}"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = _REFUSED.get(status, _line(error))
        raise MoeLensError(f"the Hugging Face hub refused ({status}: {why}); {remedy}") from error
    except (_TransportError, OSError) as error:
        raise MoeLensError(
            f"the Hugging Face hub cannot be reached ({_line(error)}); {remedy}"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
