"""Files of prompts."""

import logging
from pathlib import Path

from pid_pipelines.errors import PipelineInputError

_log = logging.getLogger("pid_pipelines")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one in each line; empty lines are left out, which the log tells.

    Raises `PipelineInputError` for a file that cannot be read, or has none.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise PipelineInputError(
            f"expected a text file of prompts, but got {path}: {reason}; give one prompt per line"
        ) from None
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise PipelineInputError(
            f"expected a prompt in each line, but {path} has none; give at least one"
        )
    if len(texts) < len(lines):
        empty = len(lines) - len(texts)
        _log.info("%d of %d lines of %s are empty and left out", empty, len(lines), path)
    return texts
