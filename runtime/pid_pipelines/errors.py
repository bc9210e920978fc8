"""What the pipelines raise when their input is at fault."""

from pid_runtime.errors import InputError


class PipelineInputError(InputError):
    """Bad input to a pipeline: one line saying what was expected, what came and how to fix it."""
