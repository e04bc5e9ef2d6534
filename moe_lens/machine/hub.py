"""The Hugging Face hub as this machine sees it: whether it answers, and which models are cached."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CachedModel", "Hub", "cached_models", "hub"]


@dataclass(frozen=True)
class Hub:
    """Whether the Hugging Face hub answers.

    Attributes:
        endpoint: Its address (HF_ENDPOINT changes it).
        reachable: None if HF_HUB_OFFLINE forbids to ask.
        detail: How long it took, or why not.
    """

    endpoint: str
    reachable: bool | None
    detail: str


@dataclass(frozen=True)
class CachedModel:
    """A model in the hub's cache on this machine.

    Attributes:
        name: owner/name.
        bytes: Size of its files.
        model_type: Of its config.json; None if there is none.
        supported: Whether moe-lens knows the routing of this model type.
    """

    name: str
    bytes: int
    model_type: str | None
    supported: bool


def hub(timeout: float = 3.0) -> Hub:
    """Ask the hub for an answer, unless HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    endpoint = str(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE:
        return Hub(endpoint, None, "not asked: HF_HUB_OFFLINE is set")
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    start = time.perf_counter()
    try:
        with urlopen(Request(endpoint, method="HEAD"), timeout=timeout):
            pass
    except HTTPError as error:
        return Hub(endpoint, False, f"it answers {error.code} {error.reason}")
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return Hub(endpoint, False, " ".join(str(reason).split()))
    return Hub(endpoint, True, f"answered in {time.perf_counter() - start:.2f} s")


def cached_models(folder: Path | None = None) -> tuple[CachedModel, ...]:
    """The models in the hub's cache, largest first; `folder` is another cache than the default."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    from moe_lens.families import all_supported

    try:
        cache = scan_cache_dir(folder)
    except CacheNotFound:
        return ()
    known = {each.model_type for each in all_supported()}
    found = []
    for repository in cache.repos:
        if repository.repo_type != "model":
            continue
        kind = _model_type([revision.snapshot_path for revision in repository.revisions])
        found.append(CachedModel(repository.repo_id, repository.size_on_disk, kind, kind in known))
    return tuple(sorted(found, key=lambda model: (-model.bytes, model.name)))


def _model_type(snapshots: list[Path]) -> str | None:
    for snapshot in snapshots:
        try:
            config = json.loads((snapshot / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and isinstance(config.get("model_type"), str):
            return str(config["model_type"])
    return None
