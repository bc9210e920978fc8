"""What the benchmark raises when its input, not its code, is at fault."""

from pid_runtime.errors import InputError


class BenchInputError(InputError):
    """Bad input to a benchmark: one line saying what was expected, what came, and how to fix it."""
