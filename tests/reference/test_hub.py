"""Downloads, without a network: what is asked of the hub, and what a failure tells the user."""

import logging
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from pid_ref.errors import PidInputError
from pid_ref.hub import download
from pid_ref.registry import CODE_LICENSE, WEIGHTS_LICENSE, find_checkpoint

CHECKPOINT = find_checkpoint("flux2", "2kto4k-v1")


def bare(kind: type[Exception]) -> Exception:
    """A hub error without the HTTP response its constructor wants."""
    return kind.__new__(kind)


def test_download_states_the_license_and_returns_the_path(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    asked: list[tuple[str, str, Any]] = []

    def fetch(repo_id: str, filename: str, cache_dir: Any) -> str:
        # Said before anything is fetched, and loud enough for a program without logging set up.
        assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
            (logging.WARNING, WEIGHTS_LICENSE)
        ]
        asked.append((repo_id, filename, cache_dir))
        return str(tmp_path / "file.pth")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert download(CHECKPOINT, cache_dir=tmp_path) == tmp_path / "file.pth"
    assert asked == [
        (
            "nvidia/PiD",
            f"checkpoints_deprecated/{CHECKPOINT.name}/model_ema_bf16.pth",
            tmp_path,
        )
    ]


def test_the_license_says_what_matters() -> None:
    for words in ("NSCLv1", "non-commercial"):
        assert words in WEIGHTS_LICENSE
    assert "Apache-2.0" in CODE_LICENSE and "Apache" not in WEIGHTS_LICENSE


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.LocalEntryNotFoundError("offline\nsecond line"), "cannot be reached"),
        (errors.OfflineModeIsEnabled("set"), "HF_HUB_OFFLINE"),
        (bare(errors.GatedRepoError), "accepted license"),
        (bare(errors.RemoteEntryNotFoundError), "404"),
        (bare(errors.RepositoryNotFoundError), "no such repository"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("transport broke\nwith details"), "RuntimeError: transport broke;"),
    ],
)
def test_failures_are_one_line_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fetch(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(PidInputError) as caught:
        download(CHECKPOINT)
    message = str(caught.value)
    assert "\n" not in message
    assert reason in message
    assert f"https://huggingface.co/nvidia/PiD/resolve/main/{CHECKPOINT.hub_path}" in message
    assert "--checkpoint PATH" in message
    assert caught.value.__cause__ is error


def test_an_interrupt_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(KeyboardInterrupt):
        download(CHECKPOINT)


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(PidInputError, match=r"not installed.*--checkpoint PATH"):
        download(CHECKPOINT)
