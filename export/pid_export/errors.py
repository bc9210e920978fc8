"""What the exporter raises when its input, not its code, is at fault."""

from pid_runtime.errors import InputError


class ExportInputError(InputError):
    """Bad input to an export or a verification: one line saying what was expected and what came."""
