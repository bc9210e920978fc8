"""What the benchmark raises when its input, not its code, is at fault."""


class BenchInputError(ValueError):
    """Bad input to a benchmark: one line saying what was expected, what came, and how to fix it."""
