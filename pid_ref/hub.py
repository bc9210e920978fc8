"""Checkpoints of the Hugging Face hub: fetched, or found where they were fetched to."""

import logging
from pathlib import Path

from pid_ref.errors import PidInputError
from pid_ref.registry import CODE_LICENSE, HUB_REPO, WEIGHTS_LICENSE, Checkpoint

_log = logging.getLogger("pid_ref")


def cached(checkpoint: Checkpoint) -> Path | None:
    """Where `download` left a checkpoint's file in the hub's own cache; None if it is not there."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = try_to_load_from_cache(HUB_REPO, checkpoint.hub_path)
    return Path(found) if isinstance(found, str) else None


def download(checkpoint: Checkpoint, cache_dir: str | Path | None = None) -> Path:
    """Fetch a checkpoint's file (2.7 GB) and return its path in the hub's cache.

    The license is stated first. A file in the cache is not fetched again, and an interrupted
    download continues where it stopped; huggingface_hub shows the progress.
    cache_dir: where to keep files; None is the hub's own cache.
    Raises `PidInputError` if huggingface_hub is not installed or the file cannot be had.
    """
    try:
        from huggingface_hub import hf_hub_download  # pyright: ignore[reportUnknownVariableType]
    except ImportError:
        raise PidInputError(
            "expected huggingface_hub for downloads, but it is not installed; "
            "install it, or pass --checkpoint PATH"
        ) from None
    _log.warning(WEIGHTS_LICENSE)
    _log.info(CODE_LICENSE)
    try:
        return Path(hf_hub_download(HUB_REPO, checkpoint.hub_path, cache_dir=cache_dir))
    except Exception as error:  # Each transport the hub may pick raises classes of its own.
        raise PidInputError(
            f"expected to download https://huggingface.co/{HUB_REPO}/resolve/main/"
            f"{checkpoint.hub_path}, but {why_not(error)}; fetch the file by other means and pass "
            "--checkpoint PATH"
        ) from error


def why_not(error: Exception) -> str:
    """Why something could not be had from the hub, in a few words."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    # Most specific first: several of these are subclasses of a later one.
    reasons: tuple[tuple[type[Exception], str], ...] = (
        (GatedRepoError, "the hub asks for an accepted license and a login"),
        (LocalEntryNotFoundError, "it is not in the cache and the hub cannot be reached"),
        (OfflineModeIsEnabled, "offline mode is set (HF_HUB_OFFLINE)"),
        (EntryNotFoundError, "the hub has no such file (404)"),
        (RepositoryNotFoundError, "the hub has no such repository, or it needs a login"),
        (HFValidationError, "that is neither a folder nor the name of a repository"),
    )
    lines = str(error).splitlines() or [""]
    return next(
        (text for kind, text in reasons if isinstance(error, kind)),
        f"{type(error).__name__}: {lines[0]}",
    )
