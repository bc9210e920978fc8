"""What the engine builder raises when its input or a build, not its code, is at fault."""

from pid_runtime.errors import InputError


class BuildInputError(InputError):
    """Bad input to a build: one line saying what was expected, what came, and how to fix it."""


class BuildError(RuntimeError):
    """An engine could not be built, or is not what it must be: one line, with the log's path."""
